"""`fastlora plan`: the memory plan of a file, whether it fits, and what to change where it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer import model as models
from pyfastlora.trainer.changes import Change
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.memory import memory_of
from pyfastlora.trainer.memory_plan import Machine, Plan, Planner
from pyfastlora.trainer.precision import device_of_run
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.speed_guess import Guess, guess
from pyfastlora.trainer.units import in_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_job(
    loaded: LoadedConfig,
    console: Console,
    *,
    processes: int = 1,
    memory: int | None = None,
    benchmark: str | None = None,
    as_json: bool = False,
) -> bool:
    """Prints the plan; returns whether it fits. memory: of the device, instead of what it has."""
    from pyfastlora.trainer.job import libraries_quiet

    config = loaded.config
    with libraries_quiet():
        tokenizer = models.load_tokenizer(config)
        machine = machine_here(memory)
        planner = Planner(tokenizer, machine, strategy_of(config, processes, machine.device), processes)
        plan = planner.plan(config)
        changes = [] if plan.fits else planner.fitting(config, most=1)
        speed = guess(planner.model_of(config), config, benchmark)
    if as_json:
        console.say(json.dumps(_facts(plan, changes, speed), indent=2))
        return plan.fits
    for line in plan.lines():
        console.say(line)
    console.say(speed.sentence)
    if not plan.fits:
        for line in advice(changes):
            console.say(line)
    return plan.fits


def strategy_of(config: Config, processes: int, device: str) -> str:
    """The name of what so many processes divide; DeepSpeed need not be installed for its presets."""
    from pyfastlora.trainer.strategy import resolve

    preset = config.strategy or ""
    return preset if preset.startswith("zero") else resolve(config, Processes(count=processes), device).name


def machine_here(memory: int | None = None) -> Machine:
    """The device of this process and its memory, or so much."""
    device = device_of_run()
    return Machine(device.type, memory if memory is not None else memory_of(device))


def advice(changes: list[tuple[Change, Plan]]) -> list[str]:
    """A line for each change that makes it fit; one that says that none of those tried does."""
    if not changes:
        return ["nothing that was tried makes it fit: take a smaller base_model, or more memory"]
    return [f"it fits with {change}: {in_words(plan.needed)} needed" for change, plan in changes]


@dataclass
class RunMemory:
    """What a run was planned to take, and what it took. Without a plan, `why_not` says why there is none."""

    plan: Plan | None
    why_not: str = ""
    measured: int | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        data: Any,
        strategy: str,
        processes: Processes,
    ) -> RunMemory:
        """Before anything is loaded, of data that is known; the first process plans for all.

        A model that cannot be planned is trained all the same.
        """
        if not processes.is_first:
            return cls(None, "by the first process")
        engine = (strategy, processes.count)
        try:
            planner = Planner(tokenizer, machine_here(), *engine, longest=longest_of(data))
            return cls(planner.plan(config))
        except UserError as error:
            return cls(None, str(error))

    @property
    def line(self) -> str:
        """What is known by now."""
        if self.plan is None:
            return f"memory: not planned: {self.why_not}"
        planned = f"{in_words(self.plan.total)} planned, in {self.plan.phase}"
        if self.measured is not None:
            return f"memory: {in_words(self.measured)} at most; {planned}"
        fit = "" if self.plan.fits else f", of {in_words(self.plan.machine.memory)}: this may not fit"
        return f"memory: {planned}{fit}"

    def to_dict(self, measured: int | None = None) -> dict[str, Any]:
        """The plan, and the peak that was measured, for plan.json."""
        self.measured = measured
        planned = {"not_planned": self.why_not} if self.plan is None else {"planned": self.plan.to_dict()}
        return {**planned, "measured_bytes": measured}


def longest_of(data: Any) -> int | None:
    """Tokens of the longest sample of prepared data; None where they are streamed."""
    known = "length" in (getattr(data, "column_names", None) or ())
    return max(data["length"]) if known else None


def _facts(plan: Plan, changes: list[tuple[Change, Plan]], speed: Guess) -> dict[str, Any]:
    fitting = [{"keys": c.keys, "cost": c.cost, "plan": p.to_dict()} for c, p in changes]
    return {**plan.to_dict(), "changes": fitting, "tokens_per_second": speed.tokens_per_second}
