"""lora_backward in Triton: ds [T, R] = scale * dy b and db [O, R] = dy^T s, in one pass over dy.

One program takes BLOCK_O columns of dy down all rows, or down a part of them where there are few columns:
its rows of b and its sums of db stay in registers, and what its columns add to ds goes to a part that a
second launch adds (_split.py). So dy [T, O] is read once, and ds is written and read O / BLOCK_O times in
float32: of a bfloat16 dy, with 16 ranks and BLOCK_O = 128, half the bytes of a second pass, and those mostly
in the L2 cache. Where it is all of them (32 ranks, or 16 where registers allow 64 columns only, as on AMD's
chips) two passes run instead, `lora_shrink` and `lora_grad`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton import _split
from pyfastlora.kernels_triton._dot import dot
from pyfastlora.kernels_triton._tuning import config
from pyfastlora.kernels_triton.lora_grad import lora_grad
from pyfastlora.kernels_triton.lora_shrink import lora_shrink

RANKS = 16  # that a pass has registers for


@triton.jit
def _backward_kernel(
    dy,
    b,
    s,
    ds,  # [column blocks, T, R]
    db,  # [parts, O, R]
    rows,
    cols,
    ranks,
    span,
    scale,
    one,
    dy_pitch,
    b_col,
    b_rank,
    s_pitch,
    s_rank,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    col = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    rank = tl.arange(0, BLOCK_R)[None, :]
    begin = tl.program_id(1) * span
    inside = (col < cols)[:, None] & (rank < ranks)
    factor = tl.load(b + col[:, None] * b_col + rank * b_rank, inside, 0.0)
    part = tl.program_id(0).to(tl.int64) * rows
    sums = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    for start in range(begin, tl.minimum(begin + span, rows), BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        values = tl.load(dy + row * dy_pitch + col[None, :], (row < rows) & (col < cols)[None, :], 0.0)
        down = tl.load(s + row * s_pitch + rank * s_rank, (row < rows) & (rank < ranks), 0.0)
        # Added outside the matrix units, which truncate: a sum over all tokens there would lose several bits.
        # The factor keeps Triton from moving it inside.
        sums += dot(tl.trans(values), down, PARTS) * one
        product = dot(values, factor) * scale
        tl.store(ds + (part + row) * ranks + rank, product, (row < rows) & (rank < ranks))
    at = (tl.program_id(1).to(tl.int64) * cols + col[:, None]) * ranks + rank
    tl.store(db + at, sums.to(db.dtype.element_ty), inside)


# ---- launcher ----


def lora_backward(
    dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """New, packed ds [T, R] in float32 and db [O, R] in `dtype`. dy [T, O], packed columns; b and s of any
    strides.
    """
    (rows, cols), ranks = dy.shape, b.shape[1]
    meta, programs = config("lora_backward", dy, rows)
    of_ds, of_dy = 2 * 4 * ranks, meta["BLOCK_O"] * dy.element_size()  # for a row of a block
    if ranks > RANKS or of_ds >= of_dy:
        return lora_shrink(dy, b, True, None, scale), lora_grad(s, dy, None, 1.0, True, dtype)
    new = torch.empty if cols else torch.zeros  # no column adds to ds: no program would write it
    ds = new(rows, ranks, dtype=torch.float32, device=dy.device)
    db = torch.empty(cols, ranks, dtype=dtype, device=dy.device)
    if db.numel():
        blocks, steps = triton.cdiv(cols, meta["BLOCK_O"]), triton.cdiv(rows, meta["BLOCK_T"])
        parts = _split.parts(blocks, steps, programs)
        span = triton.cdiv(steps, parts) * meta["BLOCK_T"]
        ds_parts, db_parts = _split.buffer(ds, blocks), _split.buffer(db, parts)
        _backward_kernel[(blocks, parts)](
            dy,
            b,
            s,
            ds_parts,
            db_parts,
            rows,
            cols,
            ranks,
            span,
            float(scale),
            1.0,
            dy.stride(0),
            *b.stride(),
            *s.stride(),
            PARTS=2 if dtype == torch.bfloat16 else 3,  # what is rounded to 8 bits needs no more than 16
            BLOCK_R=RANKS,
            **meta,
        )
        if rows:
            _split.add(ds_parts, ds)
        _split.add(db_parts, db)
    return ds, db
