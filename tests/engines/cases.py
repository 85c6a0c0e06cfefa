"""What every engine trains, and how: the same on one process, where PEFT does it, and on two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from patching.test_training import adapted, llama
from torch import Tensor, nn

STEPS = 3  # the first is watched, the second runs in groups, the third after steps of the optimizer in both
LEARNING_RATE = 0.5

ADAPTERS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "qlora": {}}
CASES = [f"{adapter}{mode}" for adapter in ADAPTERS for mode in ("", ", checkpointed")]


def make(case: str, storage: torch.dtype = torch.uint8) -> nn.Module:
    """The model of a case: equal on every process. storage: the dtype that holds 4-bit weights."""
    adapter, _, checkpointed = case.partition(", ")
    model = adapted(llama(packed=adapter == "qlora", storage=storage), **ADAPTERS[adapter]).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def batch(step: int, rank: int | None = None) -> Tensor:
    """The tokens of a step: all of them, or the half of one of two processes."""
    tokens = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(step))
    return tokens if rank is None else tokens.chunk(2)[rank]


@dataclass
class Engine:
    """A model in the hands of an engine."""

    forward: Callable[..., Any]
    backward: Callable[[Tensor], None]
    gradients: Callable[[], Iterator[tuple[str, Tensor | None]]]
    step: Callable[[], None]


@dataclass
class Trained:
    """What was seen of a case: of every step the loss and the gradients, by PEFT's parameter names."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    report: list[dict[str, Any]] = field(default_factory=list)


def single(model: nn.Module) -> Engine:
    """No engine: one process and torch."""
    return torch_engine(model, model)


def torch_engine(
    model: nn.Module,
    wrapped: nn.Module,
    gradients: Callable[[], Iterator[tuple[str, Tensor | None]]] | None = None,
) -> Engine:
    """What trains by autograd and a torch optimizer."""
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def own() -> Iterator[tuple[str, Tensor | None]]:
        return ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)

    return Engine(wrapped, lambda loss: loss.backward(), gradients or own, step)


def train(engine: Engine, rank: int | None = None) -> Trained:
    seen = Trained()
    for step in range(STEPS):
        tokens = batch(step, rank)
        loss = engine.forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        seen.losses.append(loss.item())
        # a gradient that got lost is a zero here, so that comparing it shows an error of 1
        seen.gradients.append(
            {name: torch.zeros(1) if grad is None else grad.clone() for name, grad in engine.gradients()}
        )
        engine.step()
    return seen
