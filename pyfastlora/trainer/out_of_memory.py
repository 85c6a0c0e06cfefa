"""Memory that did not suffice, in sentences: in what phase, how much was missing, and what would fit."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.memory import is_out_of_memory
from pyfastlora.trainer.memory_plan import Machine, Planner
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.units import GiB, in_words

ADVICE = 3  # changes that are named
#: Frames of the stack by file and function, and what is done in them; the innermost that is known counts.
_PHASES = (
    ("torch/optim", None, "the optimizer step"),
    ("bitsandbytes/optim", None, "the optimizer step"),
    ("torch/autograd/__init__.py", "backward", "backward"),
    ("torch/utils/checkpoint.py", "backward", "backward"),
    ("trainer/training.py", "evaluate", "evaluation"),
    ("trainer/training.py", "training_step", "forward"),
    ("trainer/training.py", "learn_groups", "forward"),
    ("transformers/trainer.py", "_save_checkpoint", "saving"),
    ("trainer/model.py", "save", "saving"),
    ("trainer/model.py", "load_base", "loading weights"),
    ("trainer/adapter.py", "add_adapter", "loading weights"),
)


class NotEnoughMemoryError(UserError):
    """Memory did not suffice. Exit code 1."""


@contextmanager
def out_of_memory_explained(config: Config, processes: Processes) -> Iterator[None]:
    """Makes a NotEnoughMemoryError of what is_out_of_memory knows; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError("\n".join([_what(error), *_advice(config, processes, error)])) from error


def phase_of(error: BaseException) -> str:
    """What was done when it was raised, by its stack."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for file, function, phase in _PHASES:
            if file in frame.filename.replace("\\", "/") and function in (None, frame.name):
                return phase
    return "training"


def wanted_and_free(error: BaseException) -> tuple[int | None, int | None]:
    """Bytes that were asked for, and that were left, where the message says so."""
    text = str(error)
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMG]iB|bytes)", text)
    free = re.search(r"of which ([\d.]+) ?([KMG]iB|bytes) is free", text)
    return _bytes(wanted), _bytes(free)


def _what(error: BaseException) -> str:
    wanted, free = wanted_and_free(error)
    numbers = f": {in_words(wanted)} were wanted" if wanted is not None else ""
    numbers += f", {in_words(free)} were free" if wanted is not None and free is not None else ""
    return f"out of memory in {phase_of(error)}{numbers}"


def _advice(config: Config, processes: Processes, error: BaseException) -> Iterator[str]:
    """What was planned, and the changes that save what was missing, the cheapest first."""
    from pyfastlora.trainer.model import load_tokenizer
    from pyfastlora.trainer.planning import advice, machine_here, strategy_of

    machine = machine_here()
    try:
        tokenizer = load_tokenizer(config)
        engine = (strategy_of(config, processes.count, machine.device), processes.count)
        plan = Planner(tokenizer, machine, *engine).plan(config)
        yield f"planned are {in_words(plan.needed)}, most of it {_largest(plan.parts)}"
        wanted, free = wanted_and_free(error)
        missing = max((wanted or GiB) - (free or 0), 0)
        room = Machine(machine.device, min(machine.memory, max(0, plan.needed - missing)))
        yield from advice(Planner(tokenizer, room, *engine).fitting(config, ADVICE))
    except UserError as why:
        yield f"no change can be advised: {why}"


def _largest(parts: dict[str, int]) -> str:
    name = max(parts, key=lambda name: parts[name])
    return f"{name} ({in_words(parts[name])})"


def _bytes(found: re.Match[str] | None) -> int | None:
    if found is None:
        return None
    return round(float(found[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])
