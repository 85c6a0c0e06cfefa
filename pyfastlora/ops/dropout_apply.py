"""dropout_apply: D(x), where a dropped-out copy is needed: DoRA with dropout multiplies W by it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu
from pyfastlora.ops.dropout_mask import DropoutMask


def dropout_apply(x: Tensor, mask: DropoutMask, *, out: Tensor | None = None) -> Tensor:
    """x with the mask's dropped elements at 0 and the kept ones times `mask.scale`, rounded once.

    x [T, I] float, packed columns. Returns a new tensor, or `out`, which may be x. Raises ValueError when the
    mask does not fit x.
    """
    if x.dim() != 2 or tuple(mask.bits.shape) != (x.shape[0], (x.shape[1] + 15) // 16 * 2):
        raise ValueError(
            f"dropout_apply: a mask of {list(mask.bits.shape)} bytes does not fit x {list(x.shape)}"
        )
    out = torch.empty_like(x) if out is None else out
    OP.pick(x)(x, mask, out)
    return out


def reference(x: Tensor, mask: DropoutMask, out: Tensor) -> None:
    out.copy_(x * mask.unpack(x.shape[1], torch.promote_types(x.dtype, torch.float32)))


def cpu(x: Tensor, mask: DropoutMask, out: Tensor) -> None:
    torch.ops.pyfastlora.dropout_apply(x, mask.bits, mask.scale, out)


OP = Op(
    "dropout_apply", Implementation("cpu", cpu, why_not_cpu), Implementation("reference", reference, always)
)
