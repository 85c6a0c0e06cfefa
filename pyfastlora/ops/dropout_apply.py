"""dropout_apply: D(x), where a dropped-out copy is needed: DoRA with dropout multiplies W by it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import rows_of, written_rows
from pyfastlora.ops._triton import triton_implementation
from pyfastlora.ops.dropout_mask import DropoutMask


def dropout_apply(x: Tensor, mask: DropoutMask, *, out: Tensor | None = None) -> Tensor:
    """x with the mask's dropped elements at 0 and the kept ones times `mask.scale`, rounded once.

    x [..., I] float, read in place where its columns are packed, else copied. Returns a new, packed tensor,
    or `out`: of x's shape, with packed columns; it may be x. Raises ValueError when the mask or out does not
    fit x.
    """
    rows = rows_of(x)
    if tuple(mask.bits.shape) != (rows.shape[0], (rows.shape[1] + 15) // 16 * 2):
        raise ValueError(
            f"dropout_apply: a mask of {list(mask.bits.shape)} bytes does not fit x {list(x.shape)}"
        )
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    OP.pick(x)(rows, mask, written_rows("dropout_apply", out, x.shape))
    return out


def reference(x: Tensor, mask: DropoutMask, out: Tensor) -> None:
    out.copy_(x * mask.unpack(x.shape[1], torch.promote_types(x.dtype, torch.float32)))


def native(x: Tensor, mask: DropoutMask, out: Tensor) -> None:
    torch.ops.pyfastlora.dropout_apply.default(x, mask.bits, mask.scale, out)


OP = Op(
    "dropout_apply",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("dropout_apply", "dropout_apply"),
    Implementation("cpu", native, why_not_cpu),
    Implementation("reference", reference, always),
)
