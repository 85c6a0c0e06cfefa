"""The record of a logging step, made here and nowhere else.

It is a line of log.jsonl, what the console shows, and what loggers such as TensorBoard are given.

step, epoch                    of the run; epoch is a fraction
loss, learning_rate, grad_norm Trainer's: loss per trained token since the last record, norm before clipping
tokens, trained_tokens         since the last record, of all processes; trained ones have a label
seconds                        since the last record, evaluations left out
tokens_per_second, trained_tokens_per_second
memory_bytes, memory_peak_bytes  of the first process: what its device's allocator holds, on a CPU all of it
eta_seconds                    until the last step, if the rest is as fast as what this process has done
last_eval_loss                 of the newest evaluation, if there was one
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.units import duration, in_words

if TYPE_CHECKING:
    import torch
    from transformers import TrainerState

#: What depends on the machine and its load; all else is the same whenever a run is done again.
MEASURED = (
    *("seconds", "tokens_per_second", "trained_tokens_per_second", "memory_bytes", "memory_peak_bytes"),
    "eta_seconds",
)


class Recorder:
    """Has the clock of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start(0)

    def start(self, step: int) -> None:
        """Time counts from here; the next step is the one behind `step`."""
        self._first, self._evaluating = step, 0.0
        self._began = self._since = time.perf_counter()

    def evaluated(self, step: int, seconds: float) -> None:
        """Leaves the time of an evaluation out; one before the first step says nothing of the others."""
        self._evaluating += seconds
        if step == self._first:
            self._began += seconds

    def record(self, state: TrainerState, tokens: int, trained: int) -> dict[str, Any]:
        """What Trainer's own numbers lack; the next record begins here."""
        from pyfastlora.trainer.memory import memory_in_use

        now = time.perf_counter()
        seconds = now - self._since - self._evaluating
        self._since, self._evaluating = now, 0.0
        memory, peak = memory_in_use(self._device)
        left = (now - self._began) / max(1, state.global_step - self._first)
        losses = (line["eval_loss"] for line in reversed(state.log_history) if "eval_loss" in line)
        last = next(losses, None)
        return {
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "trained_tokens_per_second": round(trained / seconds, 1),
            "memory_bytes": memory,
            "memory_peak_bytes": peak,
            "eta_seconds": round(left * (state.max_steps - state.global_step), 1),
            **({} if last is None else {"last_eval_loss": last}),
        }


def shown(record: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a record as people read them, in order, by what they are called."""
    formats = {
        "loss": ("loss", "{:.4f}"),
        "learning_rate": ("lr", "{:.2e}"),
        "grad_norm": ("grad norm", "{:.3g}"),
        "tokens_per_second": ("tokens/s", "{:.0f}"),
        "trained_tokens_per_second": ("trained tokens/s", "{:.0f}"),
    }
    values = {name: form.format(record[key]) for key, (name, form) in formats.items() if key in record}
    values["memory"] = f"{in_words(record['memory_bytes'])} (peak {in_words(record['memory_peak_bytes'])})"
    values["left"] = duration(record["eta_seconds"])
    if "last_eval_loss" in record:
        values["held-out loss"] = f"{record['last_eval_loss']:.4f}"
    return values
