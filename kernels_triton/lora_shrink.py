"""lora_shrink in Triton: out [T, R] = scale * D(x) a^T, float32.

One program takes BLOCK_T rows and BLOCK_R ranks. Blocks of ranks of the same rows are neighbours, so x comes
from memory once for any rank; of few rows the columns are shared out too (_split.py). Bound by memory: x,
plus the factor from L2 once per BLOCK_T rows.
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
def _shrink_kernel(
    x,
    bits,
    a,
    out,  # [parts, T, R]
    rows,
    cols,
    ranks,
    span,
    scale,
    x_pitch,
    bits_pitch,
    a_rank,
    a_col,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rank_blocks = tl.cdiv(ranks, BLOCK_R)
    row = (tl.program_id(0) // rank_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * span
    rows_inside, ranks_inside = (row < rows)[:, None], (rank < ranks)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    if bits is not None:
        byte = load_bits(bits, bits_pitch, row[:, None], rows_inside, begin, cols, BLOCK_I)
    for start in range(begin, tl.minimum(begin + span, cols), BLOCK_I):
        col = start + tl.arange(0, BLOCK_I)
        inside = rows_inside & (col < cols)[None, :]
        values = tl.load(x + row[:, None] * x_pitch + col[None, :], inside, 0.0)
        if bits is not None:
            # One step ahead by hand: loads of single bytes are not pipelined.
            ahead = load_bits(bits, bits_pitch, row[:, None], rows_inside, start + BLOCK_I, cols, BLOCK_I)
            values = tl.where(kept(byte, BLOCK_T, BLOCK_I), values, 0.0)
            byte = ahead
        at = rank[None, :] * a_rank + col[:, None].to(tl.int64) * a_col
        factor = tl.load(a + at, ranks_inside & (col < cols)[:, None], 0.0)
        # Added outside the matrix units, which truncate: over all columns that would lose several bits.
        sums += dot(values, factor) * scale
    part = tl.program_id(1).to(tl.int64) * rows
    tl.store(out + (part + row[:, None]) * ranks + rank[None, :], sums, rows_inside & ranks_inside)


# ---- launcher ----


def lora_shrink(x: Tensor, a: Tensor, transposed: bool, mask: Any, scale: float) -> Tensor:
    """A new [T, R] float32. x [T, I] with packed columns; a [R, I] (transposed: [I, R]) of any strides."""
    rows, cols = x.shape
    a_rank, a_col = a.stride()[::-1] if transposed else a.stride()
    ranks = a.shape[1 if transposed else 0]
    out = torch.empty(rows, ranks, dtype=torch.float32, device=x.device)
    if out.numel():
        meta, programs = config("lora_shrink", x, rows, ranks)
        meta["BLOCK_R"] = fit(ranks, meta["BLOCK_R"])
        blocks = triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(ranks, meta["BLOCK_R"])
        steps = triton.cdiv(cols, meta["BLOCK_I"])
        parts = _split.parts(blocks, steps, programs)
        span = triton.cdiv(steps, parts) * meta["BLOCK_I"]
        bits, bits_pitch, mask_scale = _mask.arguments(mask)
        partial = _split.buffer(out, parts)
        _shrink_kernel[(blocks, parts)](
            x,
            bits,
            a,
            partial,
            rows,
            cols,
            ranks,
            span,
            float(scale * mask_scale),
            x.stride(0),
            bits_pitch,
            a_rank,
            a_col,
            **meta,
        )
        _split.add(partial, out)
    return out
