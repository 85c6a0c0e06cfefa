"""Dense weights: float16, bfloat16, float32 or float64 matrices, [O, I] as nn.Linear holds them or [I, O]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfastlora.ops import dora_norm
from pyfastlora.ops._shapes import as_dtype
from pyfastlora.weights._panels import norm_in_panels

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
    """W [O, I] as a tensor; it is cast per use where the compute dtype differs, as autocast does.

    `transposed`: the tensor is [I, O], as GPT-2's Conv1D and nn.Embedding hold it. A GEMM takes either layout
    as it lies; only DoRA's norm copies one, a panel at a time.
    """

    weight: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self._matrix.shape[0], self._matrix.shape[1]

    @property
    def is_quantised(self) -> bool:
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)  # not its transpose: a view would outlive a partitioned parameter's storage

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.transposed,)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> DenseWeight:
        (weight,) = tensors
        return DenseWeight(weight, self.transposed)

    def compute_dtype(self, x: Tensor, cast: torch.dtype | None = None) -> torch.dtype:
        return cast or self.weight.dtype

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return compute

    def gradient_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return compute

    def linear(self, x: Tensor, *, stored: bool = False, onto: Tensor | None = None) -> Tensor:
        weight = as_dtype(self._matrix, x.dtype)
        return F.linear(x, weight) if onto is None else onto.addmm_(x, weight.t())

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        weight = as_dtype(self._matrix, dy.dtype)
        return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)

    def has_room(self, x: Tensor) -> bool:
        return False  # W is multiplied where its owner put it

    def copy_with_room(self, x: Tensor, *, gradient: bool) -> Tensor:
        raise AssertionError("a dense weight has no copy")

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        weight = self._matrix
        if weight.stride(1) == 1:
            return dora_norm(weight, a, b, scale)

        def panel(cols: tuple[int, int], out: Tensor) -> None:
            out.copy_(weight[:, cols[0] : cols[1]])

        return norm_in_panels(self.shape, weight.dtype, panel, a, b, scale)

    def dequantize(self, out: Tensor) -> Tensor:
        return out.copy_(self._matrix)

    @property
    def _matrix(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight
