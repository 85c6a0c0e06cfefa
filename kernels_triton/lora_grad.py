"""lora_grad in Triton: out [R, I] (or [I, R]) = scale * s^T D(x), a sum over all tokens.

One program takes BLOCK_I columns of x and BLOCK_R ranks down all rows, or down a part of them where there are
few columns (_split.py). Blocks of ranks of the same columns are neighbours, so x comes from memory once.
Bound by memory: x. No atomics: the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton import _mask, _split
from pyfastlora.kernels_triton._dot import dot
from pyfastlora.kernels_triton._mask import kept, load_bits
from pyfastlora.kernels_triton._tuning import config, fit


@triton.jit
def _grad_kernel(
    s,
    x,
    bits,
    out,  # [parts, R, I] or [parts, I, R]
    rows,
    cols,
    ranks,
    span,
    scale,
    s_pitch,
    s_rank,
    x_pitch,
    bits_pitch,
    out_rank,
    out_col,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rank_blocks = tl.cdiv(ranks, BLOCK_R)
    col = tl.program_id(0) // rank_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    rank = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * span
    cols_inside, ranks_inside = (col < cols)[None, :], (rank < ranks)[None, :]
    sums = tl.zeros([BLOCK_I, BLOCK_R], tl.float32)
    if bits is not None:
        first = tl.program_id(0) // rank_blocks * BLOCK_I
        row = (begin + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        byte = load_bits(bits, bits_pitch, row, row < rows, first, cols, BLOCK_I)
    for start in range(begin, tl.minimum(begin + span, rows), BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        rows_inside = row < rows
        values = tl.load(x + row * x_pitch + col[None, :], rows_inside & cols_inside, 0.0)
        if bits is not None:
            # One step ahead by hand: loads of single bytes are not pipelined.
            ahead = load_bits(bits, bits_pitch, row + BLOCK_T, row + BLOCK_T < rows, first, cols, BLOCK_I)
            values = tl.where(kept(byte, BLOCK_T, BLOCK_I), values, 0.0)
            byte = ahead
        down = tl.load(s + row * s_pitch + rank[None, :] * s_rank, rows_inside & ranks_inside, 0.0)
        # Added outside the matrix units, which truncate: a sum over all tokens there would lose several bits.
        sums += dot(tl.trans(values), down, PARTS) * scale
    at = tl.program_id(1).to(tl.int64) * cols * ranks + rank[None, :].to(tl.int64) * out_rank
    inside = (col < cols)[:, None] & ranks_inside
    tl.store(out + at + col[:, None].to(tl.int64) * out_col, sums.to(out.dtype.element_ty), inside)


# ---- launcher ----


def lora_grad(s: Tensor, x: Tensor, mask: Any, scale: float, transposed: bool, dtype: torch.dtype) -> Tensor:
    """A new, packed [R, I], or [I, R] when transposed. s [T, R] of any strides; x [T, I], packed columns."""
    (rows, ranks), cols = s.shape, x.shape[1]
    out = torch.empty((cols, ranks) if transposed else (ranks, cols), dtype=dtype, device=x.device)
    if out.numel():
        meta, programs = config("lora_grad", x, rows, ranks)
        meta["BLOCK_R"] = fit(ranks, meta["BLOCK_R"])
        blocks = triton.cdiv(cols, meta["BLOCK_I"]) * triton.cdiv(ranks, meta["BLOCK_R"])
        steps = triton.cdiv(rows, meta["BLOCK_T"])
        parts = _split.parts(blocks, steps, programs)
        span = triton.cdiv(steps, parts) * meta["BLOCK_T"]
        bits, bits_pitch, mask_scale = _mask.arguments(mask)
        partial = _split.buffer(out, parts)
        _grad_kernel[(blocks, parts)](
            s,
            x,
            bits,
            partial,
            rows,
            cols,
            ranks,
            span,
            float(scale * mask_scale),
            *s.stride(),
            x.stride(0),
            bits_pitch,
            *(out.stride()[::-1] if transposed else out.stride()),
            PARTS=2 if dtype == torch.bfloat16 else 3,  # what is rounded to 8 bits needs no more than 16
            **meta,
        )
        _split.add(partial, out)
    return out
