"""matmul_4bit in Triton, for a few rows of x: y = x W^T or x W straight from the packed weight.

One program takes BLOCK_O outputs of all rows, and decodes its part of W once; where that leaves the chip idle
the inner dimension is shared out as well (_split.py). Bound by the look-ups of the codes rather than by their
half byte per weight.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton import _split
from pyfastlora.kernels_triton._decode_4bit import TYPES, code_of, constants, decode, tensors
from pyfastlora.kernels_triton._dot import dot
from pyfastlora.kernels_triton._tuning import config

ROWS = 16  # of x, that one pass over the weight serves


@triton.jit
def _matmul_kernel(
    x,
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    out,  # [parts, T, outer]
    rows,
    inner,
    outer,
    span,
    x_pitch,
    out_pitch,
    TRANSPOSED: tl.constexpr,
    VALUES: tl.constexpr,
    FOUR_BIT_FLOAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.arange(0, BLOCK_T)
    begin = tl.program_id(1) * span
    code = code_of(FOUR_BIT_FLOAT)
    sums = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    out_col = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    for start in range(begin, tl.minimum(begin + span, inner), BLOCK_I):
        at = start + tl.arange(0, BLOCK_I)
        values = tl.load(
            x + row[None, :].to(tl.int64) * x_pitch + at[:, None],
            (row < rows)[None, :] & (at < inner)[:, None],
            0.0,
        )
        if TRANSPOSED:  # W [inner, outer]
            run = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O // RUN) * RUN
            first = at[:, None].to(tl.int64) * outer + run[None, :]
            inside = (at < inner)[:, None] & (run < outer)[None, :]
        else:  # W [outer, inner]
            run = start + tl.arange(0, BLOCK_I // RUN) * RUN
            first = out_col[:, None].to(tl.int64) * inner + run[None, :]
            inside = (out_col < outer)[:, None] & (run < inner)[None, :]
        weight = decode(
            packed,
            absmax,
            nested_code,
            nested_absmax,
            nested_offset,
            code,
            first,
            inside,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            RUN,
        )
        if TRANSPOSED:
            weight = tl.trans(tl.reshape(weight, [BLOCK_I, BLOCK_O]))
        else:
            weight = tl.reshape(weight, [BLOCK_O, BLOCK_I])
        sums += dot(weight.to(VALUES).to(x.dtype.element_ty), values)
    inside = (out_col < outer)[:, None] & (row < rows)[None, :]
    to = out + (tl.program_id(1).to(tl.int64) * rows + row[None, :]) * out_pitch + out_col[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), inside)


# ---- launcher ----


def matmul_4bit(x: Tensor, w: Any, transposed: bool, values: Any, out: Tensor) -> None:
    """out [T, outer] of any pitch; at most ROWS rows of x [T, inner], packed columns; w a Packed4bit."""
    rows, inner = x.shape
    outer = out.shape[1]
    if out.numel():
        meta, programs = config("matmul_4bit", x, inner)
        blocks, steps = triton.cdiv(outer, meta["BLOCK_O"]), triton.cdiv(inner, meta["BLOCK_I"])
        parts = _split.parts(blocks, steps, programs)
        span = triton.cdiv(steps, parts) * meta["BLOCK_I"]
        partial = _split.buffer(out, parts)
        _matmul_kernel[(blocks, parts)](
            x,
            *tensors(w),
            partial,
            rows,
            inner,
            outer,
            span,
            x.stride(0),
            partial.stride(-2),
            TRANSPOSED=transposed,
            VALUES=TYPES[values],
            BLOCK_T=ROWS,
            **constants(w),
            **meta,
        )
        _split.add(partial, out)
