"""dropout_mask in Triton: flags packed to bits in one launch.

Drawing them stays with torch, whose generator and order are those of the numbers wanted. Bound by memory: a
byte read per element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._tuning import config


@triton.jit
def _pack_kernel(keep, bits, cols, keep_pitch, bits_pitch, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)[None, :]
    col = byte[:, None] * 8 + bit
    flag = tl.load(keep + row * keep_pitch + col, col < cols, 0).to(tl.int32)
    tl.store(bits + row * bits_pitch + byte, tl.sum(flag << bit, 1).to(tl.uint8), byte < bits_pitch)


# ---- launcher ----


def pack(keep: Tensor) -> Tensor:
    """Bits uint8 [T, 2 ceil(C / 16)] of keep [T, C] bool with packed columns; see _mask.py."""
    rows, cols = keep.shape
    bits = torch.empty(rows, (cols + 15) // 16 * 2, dtype=torch.uint8, device=keep.device)
    if bits.numel():
        meta, _ = config("dropout_mask", keep)
        grid = (rows, triton.cdiv(bits.shape[1], meta["BLOCK"]))
        _pack_kernel[grid](keep.view(torch.uint8), bits, cols, keep.stride(0), bits.shape[1], **meta)
    return bits
