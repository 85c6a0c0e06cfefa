"""What an optimizer keeps for each trained parameter, and what its step needs for a moment.

Counted by name: `adamw`, `lion` and the like say how many values there are for one of a parameter, `8bit`
and `4bit` in how many bits. bitsandbytes and torchao hold small parameters' states in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

_QMAP = 256 * 4  # bytes: the values that 8 bits stand for


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """Of all that `optimizer` (transformers' name) keeps between two steps."""
    parameters = list(parameters)
    if optimizer == "adafactor":
        return sum(map(_factored, parameters))
    of_torchao = optimizer in ("adamw_torch_8bit", "adamw_torch_4bit")
    of_bnb = not of_torchao and ("8bit" in optimizer or "32bit" in optimizer or optimizer in _BNB_IN_FLOATS)
    bits = 8 if "8bit" in optimizer else 4 if "4bit" in optimizer else 32
    values, total, packed = _values(optimizer), 0, False
    for p in parameters:
        n = p.numel()
        if bits < 32 and n >= 4096 and (not of_torchao or n % 256 == 0):
            block = 128 if bits == 4 else 256
            total += values * (n * bits // 8 + 4 * -(-n // block))
            packed = True
        else:
            # torch's own keep the parameter's dtype and, but for SGD, a number of steps
            total += values * n * (4 if of_bnb else p.element_size()) + (0 if of_bnb or not values else 4)
    return total + (min(values, 2) * _QMAP if packed and of_bnb else 0)


def step_bytes(optimizer: str, parameters: Iterable[Tensor], on_gpu: bool) -> int:
    """Of what a step makes and lets go again. On a GPU torch's unfused optimizers take all parameters at
    once.
    """
    sizes = [p.numel() * p.element_size() for p in parameters]
    if not sizes or "fused" in optimizer or optimizer == "sgd":
        return 0
    if optimizer == "adafactor":
        return 3 * max(sizes)
    if optimizer in ("adamw_torch", "adagrad", "rmsprop"):
        return sum(sizes) if on_gpu else 2 * max(sizes)
    return 0


_BNB_IN_FLOATS = ("ademamix", "rmsprop_bnb")


def _values(optimizer: str) -> int:
    """How many for one of a parameter; AdamW's two unless the name says another."""
    if "ademamix" in optimizer:
        return 3
    if optimizer == "sgd":
        return 0
    return 1 if any(name in optimizer for name in ("lion", "rmsprop", "adagrad")) else 2


def _factored(p: Tensor) -> int:
    """Adafactor's means of rows and of columns, in float32."""
    if p.dim() < 2:
        return 4 * p.numel()
    rows, cols = p.shape[-2:]
    return 4 * (rows + cols) * math.prod(p.shape[:-2])
