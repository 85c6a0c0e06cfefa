"""dropout_apply in Triton: D(x), x with the dropped elements at 0 and the kept ones scaled, rounded once.

One program takes BLOCK columns of one row. Bound by memory: x read, out written, a sixteenth of x in bits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._mask import kept, load_bits
from pyfastlora.kernels_triton._tuning import config


@triton.jit
def _apply_kernel(x, bits, out, cols, scale, x_pitch, bits_pitch, out_pitch, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    col = first + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + row * x_pitch + col, col < cols, 0.0).to(tl.float32)
    byte = load_bits(bits, bits_pitch, row, first < cols, first, cols, BLOCK)
    value *= tl.where(kept(byte, 1, BLOCK), scale, 0.0)
    tl.store(out + row * out_pitch + col, value.to(out.dtype.element_ty), col < cols)


# ---- launcher ----


def dropout_apply(x: Tensor, mask: Any, out: Tensor) -> None:
    """out = D(x); both [T, I] with packed columns, and out may be x."""
    if x.numel():
        meta, _ = config("dropout_apply", x)
        grid = (x.shape[0], triton.cdiv(x.shape[1], meta["BLOCK"]))
        pitches = (x.stride(0), mask.bits.stride(0), out.stride(0))
        _apply_kernel[grid](x, mask.bits, out, x.shape[1], mask.scale, *pitches, **meta)
