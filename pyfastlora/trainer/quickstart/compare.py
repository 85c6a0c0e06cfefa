"""The same training steps with PEFT's forward and with ours, side by side.

Two copies of one model take the same batches with the same dropout masks, a step of the one, a step of the
other, so that whatever else the machine does slows both. Their losses should lie on each other; their times
should not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import pyfastlora
from pyfastlora.trainer import model as models
from pyfastlora.trainer.adapter import add_adapter
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.precision import Precision, device_of_run, resolve_precision

_WARM_UP = 3  # steps whose time is left out: the first ones allocate and compile


@dataclass(frozen=True)
class Comparison:
    """Losses per step, and tokens per second as the median over steps (warm-up left out)."""

    peft_losses: list[float]
    fast_losses: list[float]
    peft_tokens_per_second: float
    fast_tokens_per_second: float
    speedup: float  # median of the ratio within a step, which is steadier than the ratio of the medians

    @property
    def largest_difference(self) -> float:
        """Between the two losses of one step."""
        return max(abs(a - b) for a, b in zip(self.peft_losses, self.fast_losses, strict=True))


def compare(config: Config, data: Any, steps: int, console: Console) -> Comparison:
    """Runs `steps` optimizer steps of config on data (columns input_ids, labels) with both forwards."""
    device = device_of_run()
    precision = resolve_precision(config, device)
    tokenizer = models.load_tokenizer(config)
    collate = PaddingCollator(tokenizer.pad_token_id or 0)
    peft, fast = (_Side(config, precision, device, tokenizer) for _ in range(2))
    pyfastlora.patch(fast.model)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).tolist()
    batches = _batches(data, order, config.micro_batch_size, collate)
    tokens = []
    with console.bar("with and without", steps, "steps") as bar:
        for step in range(steps):
            batch = next(batches)
            tokens.append(int(batch["attention_mask"].sum()))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for side in (peft, fast) if step % 2 else (fast, peft):
                side.step(batch, seed=step)
            bar.update(step + 1, f"loss {peft.losses[-1]:.4f} and {fast.losses[-1]:.4f}")
    timed = slice(min(_WARM_UP, steps - 1), None)
    rows = list(zip(tokens[timed], peft.seconds[timed], fast.seconds[timed], strict=True))
    return Comparison(
        peft.losses,
        fast.losses,
        statistics.median(n / seconds for n, seconds, _ in rows),
        statistics.median(n / seconds for n, _, seconds in rows),
        statistics.median(slow / quick for _, slow, quick in rows),
    )


class _Side:
    """One of the two models with its optimizer."""

    def __init__(self, config: Config, precision: Precision, device: torch.device, tokenizer: Any) -> None:
        torch.manual_seed(config.seed)  # the same A on both sides
        base = models.load_base(config, precision, device)
        self.model = add_adapter(base, config, precision, tokenizer).train()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._precision = precision
        self._device = device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)

    def step(self, batch: dict[str, torch.Tensor], seed: int) -> None:
        torch.manual_seed(seed)
        started = time.perf_counter()
        with self._precision.cast(self._device):
            loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())


def _batches(
    data: Any, order: list[int], size: int, collate: PaddingCollator
) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        for i in range(0, len(order) - size + 1, size):
            yield collate([data[j] for j in order[i : i + size]])
