"""Schedules of the learning rate that transformers does not have, each a factor on every group's own rate.

one_cycle   cosine up from 1 / lr_div_factor, cosine down to 1e-4 of the start   (Smith, 2018)
log_sweep   from log_sweep_min_lr to log_sweep_max_lr, the same ratio at every step (a range test)
rex         (1 - p) / (1 - p / 2) over the share p of steps behind the warm-up   (Chen et al., 2021)
cosine      with lr_quadratic_warmup, cosine_min_lr_ratio or cosine_constant_lr_ratio

Warm-up of rex and cosine is linear, or quadratic where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.schedule import OF_OURS

Factor = Callable[[int], float]

_DIV_FACTOR, _FINAL_DIV, _RISES = 25.0, 1e4, 0.3  # torch's OneCycleLR; the last is a share of all steps


def is_ours(c: Config) -> bool:
    """Whether the schedule is one of this file."""
    shaped = c.lr_quadratic_warmup or c.cosine_min_lr_ratio is not None
    return c.lr_scheduler in OF_OURS or (c.lr_scheduler == "cosine" and shaped)


def make_schedule(c: Config, optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """The schedule of a run of `steps` steps, the first `warmup` of which warm up."""
    return LambdaLR(optimizer, factor(c, warmup, steps))


def factor(c: Config, warmup: int, steps: int) -> Factor:
    """What the learning rate of step 0, 1, ... is multiplied by."""
    if c.lr_scheduler == "log_sweep":
        return _log_sweep(c.log_sweep_min_lr / c.learning_rate, c.log_sweep_max_lr / c.learning_rate, steps)
    if c.lr_scheduler == "one_cycle":
        if c.warmup_steps is None and c.warmup_ratio is None:
            warmup = round(_RISES * steps)
        return _one_cycle(1 / (c.lr_div_factor or _DIV_FACTOR), warmup, steps)
    if c.lr_scheduler == "rex":
        return _warmed(_rex(steps - warmup), warmup, 1)
    least = c.cosine_min_lr_ratio or 0.0
    until = math.ceil(steps * (c.cosine_constant_lr_ratio or 1.0))
    return _warmed(_cosine(least, until - warmup), warmup, 2 if c.lr_quadratic_warmup else 1)


def _warmed(after: Factor, warmup: int, power: int) -> Factor:
    return lambda step: (step / warmup) ** power if step < warmup else after(step - warmup)


def _cosine(least: float, steps: int) -> Factor:
    def at(step: int) -> float:
        return least + (1 - least) * _half_cosine(min(step / max(steps, 1), 1.0))

    return at


def _rex(steps: int) -> Factor:
    def at(step: int) -> float:
        left = 1 - min(step / max(steps, 1), 1.0)
        return left / (0.5 + 0.5 * left)

    return at


def _one_cycle(start: float, warmup: int, steps: int) -> Factor:
    end, top, last = start / _FINAL_DIV, max(warmup - 1, 0), steps - 1

    def at(step: int) -> float:
        if step < top:
            return start + (1 - start) * (1 - _half_cosine(step / top))
        return end + (1 - end) * _half_cosine(min((step - top) / max(last - top, 1), 1.0))

    return at


def _log_sweep(first: float, last: float, steps: int) -> Factor:
    return lambda step: first * (last / first) ** min(step / max(steps - 1, 1), 1.0)


def _half_cosine(share: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * share))
