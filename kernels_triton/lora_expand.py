"""lora_expand in Triton: out = gain * (y + scale * D(s b^T)) + offset, rounded once; y may be absent.

One program takes a BLOCK_T x BLOCK_O tile of y, which it has read before it writes: out may be y. Bound by
memory, y read and out written; s and b come from L2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton import _mask
from pyfastlora.kernels_triton._dot import EXACT, dot, split_dot
from pyfastlora.kernels_triton._mask import kept, load_bits
from pyfastlora.kernels_triton._tuning import config, fit


@triton.jit
def _expand_kernel(
    y,
    s,
    b,
    bits,
    gain,
    offset,
    out,
    rows,
    cols,
    ranks,
    scale,
    one,
    y_pitch,
    s_pitch,
    s_rank,
    b_col,
    b_rank,
    bits_pitch,
    gain_stride,
    offset_stride,
    out_pitch,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    col_blocks = tl.cdiv(cols, BLOCK_O)
    row = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) % col_blocks * BLOCK_O
    col = first + tl.arange(0, BLOCK_O)
    rows_inside, cols_inside = (row < rows)[:, None], (col < cols)[None, :]
    inside = rows_inside & cols_inside
    term = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, ranks, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        at = row[:, None] * s_pitch + rank[None, :] * s_rank
        down = tl.load(s + at, rows_inside & (rank < ranks)[None, :], 0.0)
        at = rank[:, None].to(tl.int64) * b_rank + col[None, :].to(tl.int64) * b_col
        factor = tl.load(b + at, (rank < ranks)[:, None] & cols_inside, 0.0)
        if out.dtype.element_ty != tl.float32:
            term = split_dot(down, factor, PARTS, term)
        elif factor.dtype == tl.float32:
            term = dot(down, factor, onto=term)
        else:
            # Added outside the matrix units, which truncate; the factor keeps Triton from moving it inside.
            term += dot(down, factor) * one
    term *= scale
    if bits is not None:
        byte = load_bits(bits, bits_pitch, row[:, None], rows_inside, first, cols, BLOCK_O)
        term = tl.where(kept(byte, BLOCK_T, BLOCK_O), term, 0.0)
    value = term
    if y is not None:  # so late that no register holds it meanwhile: other programs fill the wait
        value += tl.load(y + row[:, None] * y_pitch + col[None, :], inside, 0.0).to(tl.float32)
    if gain is not None:
        value *= tl.load(gain + col * gain_stride, col < cols, 0.0).to(tl.float32)[None, :]
    if offset is not None:
        value += tl.load(offset + col * offset_stride, col < cols, 0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * out_pitch + col[None, :], value.to(out.dtype.element_ty), inside)


# ---- launcher ----


def lora_expand(
    y: Tensor | None,
    s: Tensor,
    b: Tensor,
    transposed: bool,
    mask: Any,
    scale: float,
    gain: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    """y, out [T, O] with packed columns; s [T, R], b [O, R] (transposed: [R, O]) of any strides."""
    rows, cols = out.shape
    if not out.numel():
        return
    b_rank, b_col = b.stride() if transposed else b.stride()[::-1]
    meta, _ = config("lora_expand", out, rows, s.shape[1])
    meta["BLOCK_R"] = fit(s.shape[1], meta["BLOCK_R"])
    if out.dtype == torch.float32:
        meta["BLOCK_R"] = min(meta["BLOCK_R"], EXACT)
    bits, bits_pitch, mask_scale = _mask.arguments(mask)
    _expand_kernel[(triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(cols, meta["BLOCK_O"]),)](
        y,
        s,
        b,
        bits,
        gain,
        offset,
        out,
        rows,
        cols,
        s.shape[1],
        float(scale * mask_scale),
        1.0,
        0 if y is None else y.stride(0),
        *s.stride(),
        b_col,
        b_rank,
        bits_pitch,
        0 if gain is None else gain.stride(0),
        0 if offset is None else offset.stride(0),
        out.stride(0),
        PARTS=2 if out.dtype == torch.bfloat16 else 3,  # what is rounded to 8 bits needs no more than 16
        **meta,
    )
