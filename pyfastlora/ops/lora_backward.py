"""lora_backward: what flows back through the factor B, in one pass over the output's gradient.

    dS = scale * dy B        dB = scale * dy^T S

Of y = scale S B^T, with dy [T, O]. Apart they are `lora_shrink` and `lora_grad`, each with a pass of its own;
dy is what costs. Sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import like, rows_of
from pyfastlora.ops._triton import triton_implementation
from pyfastlora.ops.lora_grad import lora_grad
from pyfastlora.ops.lora_shrink import lora_shrink


def lora_backward(
    dy: Tensor, b: Tensor, s: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(scale * dy b [..., R] in float32, scale * dy^T s [O, R] in `dtype`); float64 for float64 dy.

    dy [..., O] float, read in place where its columns are packed, else copied; b [O, R] of any float dtype;
    s [..., R] as `lora_shrink` makes it; dtype a floating one, default b's. New tensors. Raises ValueError
    when b or s does not fit dy.
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
    ds = lora_shrink(dy, b, transposed=True, scale=scale)
    return ds, lora_grad(s, dy, scale=scale, transposed=True, dtype=dtype)


def cpu(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dy.dtype == torch.float32:  # where the vendor's GEMMs are faster than ours
        return two_passes(dy, b, s, scale, dtype)
    return native(dy, b, s, scale, dtype)


def native(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    written = torch.float32 if dtype == torch.float64 else dtype
    make = torch.empty if dy.shape[1] else torch.zeros  # the kernels write nothing where there is nothing
    ds = make(s.shape, dtype=torch.float32, device=dy.device)
    db = torch.empty(b.shape, dtype=written, device=dy.device)
    torch.ops.pyfastlora.lora_backward(dy, b, s, scale, ds, db)
    return ds, db.to(dtype)


OP = Op(
    "lora_backward",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("lora_backward", "lora_backward"),
    Implementation("cpu", cpu, why_not_cpu),
    Implementation("reference", two_passes, always),
)
