"""dequant_8bit: bitsandbytes' LLM.int8 rows to float, bit-equal to its `int8_vectorwise_dequant`.

    value[o, i] = values[o, i] * absmax[o] * (1 / 127)         in float32 from the left, rounded once

Source: Dettmers et al. 2022 (LLM.int8), section 3; bitsandbytes/_ops.py (int8_vectorwise_dequant).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import describe
from pyfastlora.ops._triton import triton_implementation


@dataclass(frozen=True, slots=True)
class Packed8bit:
    """An 8-bit weight [O, I] as bitsandbytes' Int8Params holds it: CB and SCB.

    values int8 [O, I] with packed columns; absmax float32 [O], the largest magnitude of each row. `dtype` is
    the one the weight had before it was quantised; `dequant_8bit` gives it back unless told otherwise.
    """

    values: Tensor
    absmax: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.dim() != 2:
            raise ValueError(f"dequant_8bit: values must be [O, I] int8; got {describe(self.values)}")
        if self.absmax.dtype != torch.float32 or self.absmax.shape != self.values.shape[:1]:
            raise ValueError(
                f"dequant_8bit: absmax must be [{len(self.values)}] float32, one per row of values; "
                f"got {describe(self.absmax)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])


def dequant_8bit(
    w: Packed8bit,
    dtype: torch.dtype | None = None,
    *,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weight, or its half-open range of rows and columns, as float.

    dtype: of the result (default `w.dtype`, or `out`'s). rows, cols: ranges in [0, O] and [0, I]. out: [rows,
    cols] with packed columns and any row pitch, written and returned; else a new tensor. Raises ValueError
    where a range or `out` does not fit.
    """
    (row, row_end), (col, col_end) = rows or (0, w.shape[0]), cols or (0, w.shape[1])
    if not (0 <= row <= row_end <= w.shape[0] and 0 <= col <= col_end <= w.shape[1]):
        raise ValueError(
            f"dequant_8bit: rows {rows} and cols {cols} must lie inside the weight {list(w.shape)}"
        )
    size = (row_end - row, col_end - col)
    if out is None:
        out = torch.empty(size, dtype=dtype or w.dtype, device=w.values.device)
    elif tuple(out.shape) != size or (dtype is not None and out.dtype != dtype):
        raise ValueError(
            f"dequant_8bit: out must be {list(size)} {dtype or ''}; got {list(out.shape)} {out.dtype}"
        )
    OP.pick(w.values, out.dtype)(w, row, col, out)
    return out


def reference(w: Packed8bit, row: int, col: int, out: Tensor) -> None:
    values, absmax = w.values[row:, col:][: out.shape[0], : out.shape[1]], w.absmax[row : row + out.shape[0]]
    out.copy_(values * absmax[:, None] * torch.tensor(1 / 127))


def native(w: Packed8bit, row: int, col: int, out: Tensor) -> None:
    torch.ops.pyfastlora.dequant_8bit.default(w.values, w.absmax, row, col, out)


OP = Op(
    "dequant_8bit",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("dequant_8bit", "dequant_8bit"),
    Implementation("cpu", native, why_not_cpu),
    Implementation("reference", reference, always),
)
