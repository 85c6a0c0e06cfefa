"""dora_norm in Triton: out[o] = ||W_o + s (B A)_o||, float32, W dense or packed in 4 bits.

One program takes BLOCK_O rows and walks over the columns: it makes the tile of B A that meets a tile of W, on
the matrix units, and adds the squares of the sum. B A never leaves the registers, there is no A A^T to launch
first, and no three terms that could cancel. Bound by memory, W, for ranks up to 32 or so; then by 2 O I R
flops, six times as many for float32 factors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._decode_4bit import TYPES, code_of, constants, decode, tensors
from pyfastlora.kernels_triton._dot import EXACT, split_dot
from pyfastlora.kernels_triton._tuning import config, fit


@triton.jit
def _norm_kernel(
    w,
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    a,
    b,
    out,
    rows,
    cols,
    scale,
    w_pitch,
    a_rank,
    a_col,
    b_row,
    b_rank,
    RANKS: tl.constexpr,
    ROUNDED: tl.constexpr,
    FOUR_BIT_FLOAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_inside = (row < rows)[:, None]
    if w is None:
        code = code_of(FOUR_BIT_FLOAT)
    if RANKS <= BLOCK_R:
        up = _load_up(b, b_row, b_rank, row, rows_inside, 0, RANKS, BLOCK_R)
    sums = tl.zeros([BLOCK_O], tl.float32)
    # Named here, the number of stages also holds for the loads of W, which meet no product.
    for start in tl.range(0, cols, BLOCK_I, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK_I)
        cols_inside = (col < cols)[None, :]
        if w is None:
            run = start + tl.arange(0, BLOCK_I // RUN) * RUN
            value = tl.reshape(
                decode(
                    packed,
                    absmax,
                    nested_code,
                    nested_absmax,
                    nested_offset,
                    code,
                    row[:, None] * cols + run[None, :],
                    rows_inside & (run < cols)[None, :],
                    BLOCKSIZE,
                    NESTED_BLOCKSIZE,
                    RUN,
                ),
                [BLOCK_O, BLOCK_I],
            ).to(ROUNDED)
        else:
            value = tl.load(w + row[:, None] * w_pitch + col[None, :], rows_inside & cols_inside, 0.0)
        # Apart, as only loops that hold no other are pipelined, and most adapters are this thin.
        if RANKS <= BLOCK_R:
            delta = scale * split_dot(up, _load_down(a, a_rank, a_col, col, cols_inside, 0, RANKS, BLOCK_R))
        else:
            delta = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            for rank in range(0, RANKS, BLOCK_R):
                up = _load_up(b, b_row, b_rank, row, rows_inside, rank, RANKS, BLOCK_R)
                down = _load_down(a, a_rank, a_col, col, cols_inside, rank, RANKS, BLOCK_R)
                # Added outside the matrix units, which truncate; the factor keeps Triton from moving it in.
                delta += scale * split_dot(up, down)
        value = value.to(tl.float32) + delta
        sums += tl.sum(value * value, 1)
    tl.store(out + row, tl.sqrt_rn(sums), row < rows)


@triton.jit
def _load_up(b, b_row, b_rank, row, rows_inside, start, ranks, BLOCK_R: tl.constexpr):
    rank = start + tl.arange(0, BLOCK_R)[None, :]
    return tl.load(b + row[:, None] * b_row + rank * b_rank, rows_inside & (rank < ranks), 0.0)


@triton.jit
def _load_down(a, a_rank, a_col, col, cols_inside, start, ranks, BLOCK_R: tl.constexpr):
    rank = start + tl.arange(0, BLOCK_R)[:, None]
    at = rank.to(tl.int64) * a_rank + col[None, :].to(tl.int64) * a_col
    return tl.load(a + at, (rank < ranks) & cols_inside, 0.0)


# ---- launcher ----


def dora_norm(w: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A new [O] float32. w [O, I] with packed columns, or a Packed4bit; a [R, I], b [O, R] of any strides."""
    rows, cols = w.shape
    ranks = a.shape[0]
    out = torch.empty(rows, dtype=torch.float32, device=a.device)
    if rows:
        dense = isinstance(w, Tensor)
        meta, _ = config("dora_norm", w if dense else w.packed, rows, ranks, dtype=w.dtype)
        meta["BLOCK_R"] = min(fit(ranks, meta["BLOCK_R"]), EXACT)
        nothing = {"FOUR_BIT_FLOAT": False, "BLOCKSIZE": 1, "NESTED_BLOCKSIZE": 1, "RUN": 1}
        _norm_kernel[(triton.cdiv(rows, meta["BLOCK_O"]),)](
            w if dense else None,
            *((None,) * 5 if dense else tensors(w)),
            a,
            b,
            out,
            rows,
            cols,
            float(scale),
            w.stride(0) if dense else 0,
            *a.stride(),
            *b.stride(),
            RANKS=ranks,
            ROUNDED=TYPES[w.dtype],
            **(nothing if dense else constants(w)),
            **meta,
        )
    return out
