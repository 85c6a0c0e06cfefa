"""dequant_4bit: bitsandbytes' NF4 and FP4 blocks to float, bit-equal to bitsandbytes.

    value[n, k] = code[nibble[n, k]] * absmax[(n K + k) // blocksize]            in float32, rounded once to
    the output absmax[b]   = nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset
    when nested

Source: bitsandbytes/backends/default/ops.py and csrc/kernels.cu (dequantize_4bit, dequantize_blockwise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._triton import triton_implementation

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# How native ops that have no tensor to read a dtype from are told one.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Packed4bit:
    """A 4-bit weight of `shape` [O, I] as bitsandbytes stores it.

    packed uint8 [ceil(O I / 2)], the even element of a pair in the high nibble. absmax float32 [blocks]; or,
    nested, uint8 [blocks] with nested_code float32 [256], nested_absmax float32 and nested_offset float32
    [1]. `dtype` is the one the weight had before it was quantised; `dequant_4bit` gives it back unless told
    otherwise.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested_code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 256

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"dequant_4bit: quant_type must be nf4 or fp4; got {self.quant_type!r}")
        need = (self.shape[0] * self.shape[1] + 1) // 2
        if self.packed.dtype != torch.uint8 or self.packed.numel() != need:
            raise ValueError(
                f"dequant_4bit: packed must be {need} uint8 values for a weight of {list(self.shape)}; "
                f"got {self.packed.numel()} of {str(self.packed.dtype).removeprefix('torch.')}"
            )

    @property
    def native(self) -> tuple[object, ...]:
        """The arguments that name this weight in every native op."""
        return (
            self.packed,
            self.absmax,
            self.nested_code,
            self.nested_absmax,
            self.nested_offset,
            self.blocksize,
            self.nested_blocksize,
            self.quant_type == "fp4",
        )


def dequant_4bit(
    w: Packed4bit,
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
            f"dequant_4bit: rows {rows} and cols {cols} must lie inside the weight {list(w.shape)}"
        )
    size = (row_end - row, col_end - col)
    if out is None:
        out = torch.empty(size, dtype=dtype or w.dtype, device=w.packed.device)
    elif tuple(out.shape) != size or (dtype is not None and out.dtype != dtype):
        raise ValueError(
            f"dequant_4bit: out must be {list(size)} {dtype or ''}; got {list(out.shape)} {out.dtype}"
        )
    OP.pick(w.packed, out.dtype)(w, row, col, out)
    return out


def code(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a quantisation type, float32."""
    if quant_type == "nf4":
        return torch.tensor(NF4, dtype=torch.float32, device=device)
    half = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device=device) / 12
    return torch.cat([half, -half])


def absmax_of(w: Packed4bit) -> Tensor:
    """The blocks' scales, float32 [blocks]."""
    if w.nested_code is None or w.nested_absmax is None or w.nested_offset is None:
        return w.absmax
    block = torch.arange(w.absmax.numel(), device=w.absmax.device) // w.nested_blocksize
    return w.nested_code[w.absmax.long()] * w.nested_absmax[block] + w.nested_offset


def reference(w: Packed4bit, row: int, col: int, out: Tensor) -> None:
    nibbles = torch.stack((w.packed >> 4, w.packed & 15), dim=-1).flatten()[: w.shape[0] * w.shape[1]]
    block = torch.arange(nibbles.numel(), device=nibbles.device) // w.blocksize
    values = code(w.quant_type, nibbles.device)[nibbles.long()] * absmax_of(w)[block]
    out.copy_(values.view(w.shape)[row : row + out.shape[0], col : col + out.shape[1]])


def native(w: Packed4bit, row: int, col: int, out: Tensor) -> None:
    torch.ops.pyfastlora.dequant_4bit.default(*w.native, *w.shape, row, col, out)


OP = Op(
    "dequant_4bit",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("dequant_4bit", "dequant_4bit"),
    Implementation("cpu", native, why_not_cpu),
    Implementation("reference", reference, always),
)
