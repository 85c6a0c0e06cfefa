"""ReLoRA (Lialin et al., 2023): merge the adapter every so many steps, and begin another.

At a restart the base takes in s B A, A is drawn anew and B is 0, so that the function stays what it was; of
the optimizer's states of A and B the smallest values are set to 0, all but a share of 1 - prune_ratio. The
learning rate comes back over some steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.stacked import Earlier, add_to_base, linears


class Restarts(TrainerCallback):
    """Restarts the adapter of a model every relora_steps, but not at the end."""

    def __init__(self, config: Config, earlier: Earlier) -> None:
        self._config, self._earlier = config, earlier

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, every = state.global_step, self._config.relora_steps
        assert every is not None
        if step % every == 0 and step < state.max_steps:
            self._restart(kwargs["model"], kwargs["optimizer"], step)

    def _restart(self, model: Any, optimizer: Any, step: int) -> None:
        self._earlier.took(1)
        # the same in all processes, and in a run that goes on
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + step)
        with torch.no_grad():
            for _, layer in linears(getattr(model, "module", model)):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                add_to_base(layer, b, a)
                # as PEFT draws a fresh one
                a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), math.sqrt(5), generator=generator))
                b.zero_()
                for p in (a, b):
                    for key, value in optimizer.state.get(p, {}).items():
                        if isinstance(value, Tensor) and value.shape == p.shape:
                            optimizer.state[p][key] = pruned(value, self._config.relora_prune_ratio)


def pruned(state: Tensor, ratio: float) -> Tensor:
    """state, with the share `ratio` of its values, the smallest in size, set to 0."""
    keep = state.numel() - int(state.numel() * ratio)
    largest = state.abs().flatten().topk(keep).indices
    return torch.zeros_like(state).flatten().index_copy_(0, largest, state.flatten()[largest]).view_as(state)


def with_restarts(schedule: LambdaLR, config: Config) -> LambdaLR:
    """The schedule, whose rate comes back from near 0 in a straight line after each restart."""
    every, warmup = config.relora_steps or 1, config.jagged_restart_warmup_steps

    def back(step: int) -> float:
        return 1.0 if step < every else min(1.0, (step % every + 1) / (warmup + 1))

    def slowed(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step) * back(step)

    schedule.lr_lambdas = [slowed(factor) for factor in schedule.lr_lambdas]
    return schedule
