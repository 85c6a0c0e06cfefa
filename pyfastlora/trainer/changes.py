"""What to change in a job that needs less memory, in order of what each change takes away."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyfastlora.trainer.config import Config


@dataclass(frozen=True)
class Change:
    """Keys to set to what; `cost` says what that takes away."""

    keys: dict[str, Any]
    cost: str

    def __str__(self) -> str:
        keys = ", ".join(f"{key}: {_yaml(value)}" for key, value in self.keys.items())
        return f"{keys} ({self.cost})"

    def of(self, config: Config) -> Config:
        """The configuration with the change."""
        return config.model_copy(update=self.keys)


def _options(config: Config) -> Iterator[list[Change]]:
    """Groups of changes, the cheapest group first, and in it the mildest change first."""
    if not config.gradient_checkpointing:
        yield [Change({"gradient_checkpointing": True}, "the forward runs twice")]
    micro, accumulated = config.micro_batch_size, config.gradient_accumulation_steps
    smaller = [n for n in range(micro - 1, 0, -1) if micro % n == 0]
    yield [
        Change(
            {"micro_batch_size": n, "gradient_accumulation_steps": accumulated * (micro // n)},
            "the same step in more passes",
        )
        for n in smaller
    ]
    if (config.eval_batch_size or 0) > micro:
        yield [Change({"eval_batch_size": micro}, "evaluation takes more passes")]
    has_bnb = importlib.util.find_spec("bitsandbytes") is not None
    if has_bnb and config.optimizer.startswith("adamw_torch"):
        yield [Change({"optimizer": "adamw_bnb_8bit"}, "optimizer states are rounded")]
    if config.adapter is None:
        rank = {"lora_r": 16, "lora_alpha": 32.0, "lora_target_linear": True}
        yield [Change({"adapter": "lora", **rank}, "an adapter is trained, not the model")]
    if has_bnb and config.adapter == "lora":
        yield [Change({"adapter": "qlora", "load_in_8bit": False}, "the base is rounded to 4 bits")]
    lengths = [config.sequence_len // n for n in (2, 4, 8)]
    yield [Change({"sequence_len": n}, "longer samples are dropped or cut") for n in lengths if n >= 64]


def combined(config: Config) -> Iterator[list[Change]]:
    """Each change alone, and after those of a group, each with the last one of every group before."""
    before: list[Change] = []
    for group in _options(config):
        yield from ([change] for change in group)
        if before:
            yield from ([*before, change] for change in group)
        before += group[-1:]


def join(changes: Sequence[Change]) -> Change:
    """All of them as one."""
    keys = {key: value for change in changes for key, value in change.keys.items()}
    return Change(keys, "; ".join(change.cost for change in changes))


def _yaml(value: Any) -> Any:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value
