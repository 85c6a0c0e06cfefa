"""dequant_4bit in Triton: NF4 and FP4 blocks to float, nested scales in the same launch.

One program takes BLOCK runs of one row (_decode_4bit.py). Bound by memory: half a byte read and an element
written per weight.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._decode_4bit import code_of, constants, decode, tensors
from pyfastlora.kernels_triton._tuning import config


@triton.jit
def _dequant_kernel(
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    out,
    row,
    col,
    cols,
    row_length,
    out_pitch,
    FOUR_BIT_FLOAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    run = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)) * RUN
    first = (row + out_row) * row_length + col + run
    code = code_of(FOUR_BIT_FLOAT)
    values = decode(
        packed,
        absmax,
        nested_code,
        nested_absmax,
        nested_offset,
        code,
        first,
        run < cols,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
        RUN,
    )
    out_col = run[:, None] + tl.arange(0, RUN)[None, :]
    tl.store(out + out_row * out_pitch + out_col, values.to(out.dtype.element_ty), out_col < cols)


# ---- launcher ----


def dequant_4bit(w: Any, row: int, col: int, out: Tensor) -> None:
    """A Packed4bit from `row` and `col` on into out [rows, cols], packed columns and any pitch."""
    rows, cols = out.shape
    if out.numel():
        meta, _ = config("dequant_4bit", out, cols)
        fixed = constants(w, col)
        grid = (rows, triton.cdiv(cols, meta["BLOCK"] * fixed["RUN"]))
        _dequant_kernel[grid](*tensors(w), out, row, col, cols, w.shape[1], out.stride(0), **fixed, **meta)
