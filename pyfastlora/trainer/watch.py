"""Watches the loss: which samples made it jump, and which made it no number at all.

Batches are remembered as they are, without a look at their values, until the next line of the log. Only
then, and only where something is wrong, are their samples looked up in the data, by length and by tokens: so
nothing has to travel with every sample, and any order of the data will do.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.packing import PackedRows

KEPT = 64  # batches between two lines of the log; of more, the last ones
NAMED = 8  # samples in a sentence
#: A spike without loss_watchdog_threshold: so many times the median of the last losses.
SPIKE, LOSSES, ENOUGH = 2.0, 50, 16


@dataclass
class Watch:
    """Of one run: `saw` every batch and its loss, `logged` every line of the log."""

    data: Any  # what is trained on: samples, packed rows, or a stream
    config: Config
    checkpoints: Path
    _batches: deque[tuple[int, dict[str, Tensor], Tensor]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSSES))
    _high: int = 0

    def saw(self, step: int, inputs: Mapping[str, Any], loss: Tensor) -> None:
        """A batch of the step that is made now, and its mean loss per token."""
        names = ("input_ids", "attention_mask", "position_ids")
        kept = {name: inputs[name] for name in names if name in inputs}
        self._batches.append((step, kept, loss.detach()))

    def logged(self, step: int, loss: float) -> dict[str, Any] | None:
        """What the event `spike` has to say about the steps since the last line; None where all is well.

        Raises UserError where the loss is not finite, and where it was above loss_watchdog_threshold
        loss_watchdog_patience times in a row.
        """
        batches = [(at, batch, float(mean)) for at, batch, mean in self._batches]
        self._batches.clear()
        if not math.isfinite(loss):
            raise UserError(self._not_finite(step, loss, batches))
        threshold, median = self.config.loss_watchdog_threshold, self._median()
        self._losses.append(loss)
        limit = threshold if threshold is not None else SPIKE * median
        self._high = self._high + 1 if threshold is not None and loss > threshold else 0
        if loss <= limit:
            return None
        found = self._samples(max(batches, key=lambda b: b[2], default=None))
        if self._high >= self.config.loss_watchdog_patience:
            raise UserError(
                f"the loss was above loss_watchdog_threshold: {threshold:g} on {self._high} lines of the log "
                f"in a row, at last {loss:.4g} at step {step}, so training stopped{_named(found)}; "
                f"{self._way_out(step)}"
            )
        return {"step": step, "loss": loss, "limit": round(limit, 4), **found}

    def _median(self) -> float:
        return statistics.median(self._losses) if len(self._losses) >= ENOUGH else math.inf

    def _not_finite(self, step: int, loss: float, batches: list[tuple[int, Any, float]]) -> str:
        first = next((b for b in batches if not math.isfinite(b[2])), None)
        at = first[0] if first else step
        elsewhere = "; the batch is that of another process or of long ago"
        where = _named(self._samples(first)) if first else elsewhere
        return (
            f"the loss is {loss} at step {at}, so training stopped{where}; {self._way_out(at)}; a lower "
            "learning_rate, more warmup_steps or a smaller max_grad_norm usually helps"
        )

    def _way_out(self, step: int) -> str:
        numbers = {
            int(p.name.removeprefix("checkpoint-")): p
            for p in self.checkpoints.glob("checkpoint-*")
            if p.name.removeprefix("checkpoint-").isdigit()
        }
        good = [n for n in numbers if n < step]
        return f"the last good checkpoint is {numbers[max(good)]}" if good else "no checkpoint is from before"

    def _samples(self, batch: tuple[int, Any, float] | None) -> dict[str, Any]:
        """Where the samples of a batch are in the data, and its own loss."""
        if batch is None:
            return {}
        step, inputs, loss = batch
        return {"batch_step": step, "batch_loss": loss, "samples": find(self.data, documents(inputs))}


def documents(inputs: Mapping[str, Tensor]) -> Iterator[list[int]]:
    """The token ids of the samples of a batch, padded or packed; padding of packed rows is one, too."""
    ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    for i, row in enumerate(ids):
        if positions is not None:
            starts = (positions[i].cpu() == 0).nonzero()[:, 0].tolist()
            for begin, end in zip(starts, [*starts[1:], len(row)], strict=True):
                yield row[begin:end].tolist()
        else:
            yield (row if mask is None else row[mask[i].cpu().bool()]).tolist()


def find(data: Any, wanted: Iterator[list[int]]) -> list[int]:
    """The numbers of these samples in the data, the first where it has several; [] for a stream."""
    samples = data.data if isinstance(data, PackedRows) else data
    if "length" not in (getattr(samples, "column_names", None) or ()):
        return []
    lengths = np.asarray(samples["length"])
    found = []
    for ids in wanted:
        same_length = np.flatnonzero(lengths == len(ids)).tolist()
        found += [n for n in same_length if list(samples[n]["input_ids"]) == ids][:1]
    return found


def per_token(loss: Tensor, tokens: Tensor, of_step: Any) -> Tensor:
    """The mean loss of a batch, from its share in the mean of a step that trains on `of_step` tokens."""
    if of_step is None:
        return loss
    return loss * torch.as_tensor(of_step, device=loss.device) / tokens.to(loss.device).clamp_min(1)


def _named(found: Mapping[str, Any]) -> str:
    samples = found.get("samples") or []
    if not samples:
        return "; its samples are not in the data by number, as those of a stream"
    more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    return f"; the batch had samples {', '.join(map(str, samples[:NAMED]))}{more} of the prepared data"
