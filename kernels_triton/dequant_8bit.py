"""dequant_8bit in Triton: LLM.int8's rows to float.

One program takes BLOCK columns of one row. Bound by memory: a byte read and an element written per weight.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._tuning import config


@triton.jit
def _dequant_kernel(values, absmax, out, row, col, cols, pitch, out_pitch, BLOCK: tl.constexpr):
    out_row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + (row + out_row) * pitch + col + at, at < cols, 0).to(tl.float32)
    value = value * tl.load(absmax + row + out_row) * (1.0 / 127)
    tl.store(out + out_row * out_pitch + at, value.to(out.dtype.element_ty), at < cols)


# ---- launcher ----


def dequant_8bit(w: Any, row: int, col: int, out: Tensor) -> None:
    """A Packed8bit from `row` and `col` on into out [rows, cols], packed columns and any pitch."""
    rows, cols = out.shape
    if out.numel():
        meta, _ = config("dequant_8bit", out)
        grid = (rows, triton.cdiv(cols, meta["BLOCK"]))
        pitches = (w.values.stride(0), out.stride(0))
        _dequant_kernel[grid](w.values, w.absmax, out, row, col, cols, *pitches, **meta)
