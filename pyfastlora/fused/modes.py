"""What is common to the nodes: how they meet autocast, requests for backends, and leading dimensions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pyfastlora.ops._registry import requests, requests_in_force

_AS_IT_IS = contextlib.nullcontext()


def obeying(requested: dict[str, str]) -> contextlib.AbstractContextManager[None]:
    """The forward's requests. A compiled backward is traced with its forward, while they are in force."""
    if requested is requests_in_force() or torch.compiler.is_compiling():
        return _AS_IT_IS
    return requests(requested)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[torch.dtype | None]:
    """Autocast off inside, because every cast here is explicit; gives the dtype it would have cast x to, or
    None.
    """
    dtype = autocast_dtype(x)
    if torch.compiler.is_compiling():
        # A backward is traced as if autocast were off, and becomes part of a graph that is made with it on.
        # And where torch 2.13 meets the first stride inside the context, autocast stays off for what follows.
        x.stride()
        return _without_autocast(x.device.type, dtype)
    return _AS_IT_IS if dtype is None else _without_autocast(x.device.type, dtype)


@contextlib.contextmanager
def _without_autocast(device: str, dtype: torch.dtype | None) -> Iterator[torch.dtype | None]:
    with torch.autocast(device, enabled=False):
        yield dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to, or None."""
    device = x.device.type
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else None


def output_like(x: Tensor, y: Tensor) -> Tensor:
    """y [T, O] in x's leading dimensions. No view: autograd lets nobody write into one that a Function made.

    PEFT's output can be written to: Llama 4 adds its routed experts to what its shared expert returned.
    """
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])
