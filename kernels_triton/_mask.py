"""Dropout masks as bits: uint8 [T, 2 ceil(C / 16)], bit c % 8 of byte c / 8 keeps element c of a row."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_bits(bits, pitch, row, rows_inside, start, cols, COLS: tl.constexpr):
    """The bytes of elements start .. start + COLS of the rows [rows, 1]: uint8 [rows, COLS / 8]."""
    byte = start // 8 + tl.arange(0, COLS // 8)[None, :]
    return tl.load(bits + row * pitch + byte, rows_inside & (byte * 8 < cols), 0)


@triton.jit
def kept(byte, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which of the elements are kept, [ROWS, COLS]."""
    flags = (byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(flags, [ROWS, COLS]) != 0


def arguments(mask: Any) -> tuple[Tensor | None, int, float]:
    """(bits, their pitch, the scale of what is kept) of a mask, or of none."""
    return (None, 0, 1.0) if mask is None else (mask.bits, mask.bits.stride(0), mask.scale)
