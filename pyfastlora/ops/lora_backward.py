"""lora_backward: what flows back through the factor B, in one pass over the output's gradient.

    dS = scale * dy B        dB = dy^T S

Of y = S B^T and S = scale * x A^T, with dy [T, O]; dS is the gradient of x A^T. Apart they are `lora_shrink`
and `lora_grad`, each with a pass of its own; dy is what costs. Sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyfastlora.ops import _gemm
from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import as_dtype, like, rows_of
from pyfastlora.ops._triton import triton_implementation
from pyfastlora.ops.lora_grad import lora_grad
from pyfastlora.ops.lora_shrink import lora_shrink


def lora_backward(
    dy: Tensor, b: Tensor, s: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(scale * dy b [..., R] in s's dtype, dy^T s [O, R] in `dtype`).

    dy [..., O] float, read in place where its columns are packed, else copied; b [O, R] and s [..., R] of any
    float dtype; dtype a floating one, default b's. New tensors. Raises ValueError when b or s does not fit
    dy.
    """
    fits = b.dim() == 2 and dy.dim() > 0 and dy.shape[-1] == b.shape[0]
    if not fits or s.shape != (*dy.shape[:-1], b.shape[1]):
        raise ValueError(
            f"lora_backward: dy [..., O], b [O, R] and s [..., R] must fit; "
            f"got {list(dy.shape)}, {list(b.shape)} and {list(s.shape)}"
        )
    ds, db = OP.pick(dy)(rows_of(dy), rows_of(b), rows_of(s), scale, dtype or b.dtype)
    return like(dy, ds), db


def two_passes(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ds = lora_shrink(dy, b, transposed=True, scale=scale, dtype=s.dtype)
    return ds, lora_grad(s, dy, transposed=True, dtype=dtype)


def cpu(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dy.dtype == torch.float32:  # where the vendor's GEMMs are faster than ours
        return two_passes(dy, b, s, scale, dtype)
    ds, db = native(dy, b, s.float(), scale, dtype)
    return as_dtype(ds, s.dtype), db


def gpu(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The vendor's GEMMs where they take the operands, else the kernel."""

    def run(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if _gemm.takes(dy.dtype, b.dtype, s.dtype) and _gemm.gives(dtype, dy):
            return _gemm.product(dy, b, scale), _gemm.product(dy.t(), s, dtype=dtype)
        ds, db = kernel(dy, b, s.float(), scale, dtype)
        return as_dtype(ds, s.dtype), db

    return run


def native(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    written = torch.float32 if dtype == torch.float64 else dtype
    make = torch.empty_like if dy.shape[1] else torch.zeros_like  # the kernels write nothing of nothing
    ds, db = make(s), b.new_empty(b.shape, dtype=written)
    torch.ops.pyfastlora.lora_backward.default(dy, b, s, scale, ds, db)
    return ds, as_dtype(db, dtype)


TRITON = triton_implementation("lora_backward", "lora_backward")
OP = Op(
    "lora_backward",
    Implementation("gpu", gpu(native), why_not_gpu),
    replace(TRITON, run=gpu(TRITON.run)),
    Implementation("cpu", cpu, why_not_cpu),
    Implementation("reference", two_passes, always),
)
