"""dora_norm: row norms of `W + s B A` without making B A.

    ||W_o + s (B A)_o||^2 = ||W_o||^2 + 2 s <W_o A^T, B_o> + s^2 B_o (A A^T) B_o^T

One pass over W, dense or packed; float32 inside (float64 for float64 weights). GPUs make the left side, a
tile of `W + s B A` at a time in registers: their matrix units take less time for it than the pass over W.
PEFT makes B A by pushing an identity through the adapter and adds it to a copy of W; the reference, which is
the definition, makes B A too. Source: Liu et al. 2024 (DoRA), peft/tuners/lora/dora.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import rows_of
from pyfastlora.ops._triton import triton_implementation
from pyfastlora.ops.dequant_4bit import DTYPE_CODES, Packed4bit, dequant_4bit


def dora_norm(w: Tensor | Packed4bit, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W_o + scale (B A)_o|| for every output row, float32 [O] (float64 for a float64 weight).

    w [O, I] dense, read in place where its columns are packed, else copied, or packed 4-bit (its values
    rounded to `w.dtype`); a [R, I], b [O, R] float. Raises ValueError when the factors do not fit.
    """
    if tuple(w.shape) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"dora_norm: a [R, I] and b [O, R] must fit the weight {list(w.shape)}; "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    weight = w if isinstance(w, Packed4bit) else rows_of(w)
    return OP.pick(a, w.dtype)(weight, rows_of(a), rows_of(b), scale)


def reference(w: Tensor | Packed4bit, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dense = dequant_4bit(w) if isinstance(w, Packed4bit) else w
    wide = torch.promote_types(dense.dtype, torch.float32)
    return torch.linalg.norm(dense.to(wide) + scale * (b.to(wide) @ a.to(wide)), dim=1)


def native(w: Tensor | Packed4bit, a: Tensor, b: Tensor, scale: float) -> Tensor:
    out = torch.empty(w.shape[0], dtype=torch.float32, device=a.device)
    if isinstance(w, Packed4bit):
        torch.ops.pyfastlora.dora_norm_4bit.default(*w.native, DTYPE_CODES[w.dtype], a, b, scale, out)
    else:
        torch.ops.pyfastlora.dora_norm.default(w, a, b, scale, out)
    return out


OP = Op(
    "dora_norm",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("dora_norm", "dora_norm"),
    Implementation("cpu", native, why_not_cpu),
    Implementation("reference", reference, always),
)
