"""Dense weights: float16, bfloat16, float32 or float64 matrices [O, I], as nn.Linear holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfastlora.ops import dora_norm

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not(weight: Tensor) -> str | None:
    """Why this weight cannot be taken, or None."""
    if weight.dim() != 2:
        return f"the base weight has {weight.dim()} dimensions, a linear layer's has 2"
    if weight.dtype not in DTYPES:
        return f"the base weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.layout is not torch.strided:
        return f"the base weight's layout is {str(weight.layout).removeprefix('torch.')}"
    return None


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """W [O, I] as a tensor; it is cast per use where the compute dtype differs, as autocast does."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> DenseWeight:
        return DenseWeight(*tensors)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.weight.dtype

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return compute

    def linear(self, x: Tensor, *, stored: bool = False) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        weight = self.weight.to(dy.dtype)
        return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        weight = self.weight if self.weight.stride(1) == 1 else self.weight.contiguous()
        return dora_norm(weight, a, b, scale)

    def dequantize(self, out: Tensor) -> Tensor:
        return out.copy_(self.weight)
