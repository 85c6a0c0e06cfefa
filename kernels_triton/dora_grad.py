"""dora_grad in Triton: dz = dy * gain and dgain = sum over tokens of dy * z, one pass over each tensor.

One program takes BLOCK_O columns down a part of the rows; the parts of dgain are added by a second launch
(_split.py). Bound by memory: three passes over [T, O].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton import _split
from pyfastlora.kernels_triton._tuning import config


@triton.jit
def _grad_kernel(
    dy,
    z,
    gain,
    dz,
    dgain,  # [parts, O]
    rows,
    cols,
    span,
    dy_pitch,
    z_pitch,
    gain_stride,
    dz_pitch,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols_inside = (col < cols)[None, :]
    factor = tl.load(gain + col * gain_stride, col < cols, 0.0).to(tl.float32)[None, :]
    begin = tl.program_id(1) * span
    sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(begin, tl.minimum(begin + span, rows), BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        inside = (row < rows) & cols_inside
        d = tl.load(dy + row * dy_pitch + col[None, :], inside, 0.0).to(tl.float32)
        sums += d * tl.load(z + row * z_pitch + col[None, :], inside, 0.0).to(tl.float32)
        tl.store(dz + row * dz_pitch + col[None, :], (d * factor).to(dz.dtype.element_ty), inside)
    part = tl.program_id(1).to(tl.int64) * cols
    tl.store(dgain + part + col, tl.sum(sums, 0), col < cols)


# ---- launcher ----


def dora_grad(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """A new dz [T, O] like dy and dgain [O] float32. dy, z with packed columns; gain [O]."""
    rows, cols = dy.shape
    dz = torch.empty(rows, cols, dtype=dy.dtype, device=dy.device)
    dgain = torch.empty(cols, dtype=torch.float32, device=dy.device)
    if cols:
        meta, programs = config("dora_grad", dy, rows)
        blocks, steps = triton.cdiv(cols, meta["BLOCK_O"]), triton.cdiv(rows, meta["BLOCK_T"])
        parts = _split.parts(blocks, steps, programs)
        span = triton.cdiv(steps, parts) * meta["BLOCK_T"]
        partial = _split.buffer(dgain, parts)
        pitches = (dy.stride(0), z.stride(0), gain.stride(0), dz.stride(0))
        _grad_kernel[(blocks, parts)](dy, z, gain, dz, partial, rows, cols, span, *pitches, **meta)
        _split.add(partial, dgain)
    return dz, dgain
