"""4-bit weights of bitsandbytes: `Params4bit` with its `QuantState`, NF4 or FP4, single or double
quantisation.

bitsandbytes itself is not imported: a quant state is read by its attributes. Source of the layout:
bitsandbytes/functional.py (QuantState), bitsandbytes/nn/modules.py (Params4bit, Linear4bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfastlora.ops import Packed4bit, dequant_4bit, dora_norm, matmul_4bit
from pyfastlora.ops.matmul_4bit import FEW_ROWS_GPU
from pyfastlora.weights import _dense_copy

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(weight: Tensor, quant_state: Any, compute_dtype: torch.dtype | None) -> str | None:
    """Why this weight cannot be taken, or None."""
    if quant_state is None:
        return "the 4-bit weight is not quantised yet: move the model to its device first"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked this weight for its CPU inference kernel"
    shape = tuple(quant_state.shape)
    if len(shape) != 2:
        return f"the 4-bit weight has shape {list(shape)}, a linear layer's has two dimensions"
    if quant_state.quant_type not in ("nf4", "fp4"):
        return f"the 4-bit weight's quant_type is {quant_state.quant_type!r}, not nf4 or fp4"
    if quant_state.blocksize not in BLOCKSIZES:
        return f"the 4-bit weight's blocksize is {quant_state.blocksize}, not a power of two from 32 to 4096"
    if quant_state.dtype not in DTYPES:
        return f"the 4-bit weight was {quant_state.dtype} before it was quantised"
    if compute_dtype is not None and compute_dtype not in DTYPES:
        return f"the 4-bit layer computes in {compute_dtype}"
    held, need = weight.numel() * weight.element_size(), (shape[0] * shape[1] + 1) // 2
    if held != need or not weight.is_contiguous():
        return f"the 4-bit weight holds {held} bytes where {list(shape)} needs {need}"
    return None


@dataclass(frozen=True, slots=True)
class Bnb4bitWeight:
    """W [O, I] as packed nibbles with their scales. `compute` is the layer's compute_dtype; None: the input's
    dtype.
    """

    packed: Packed4bit
    compute: torch.dtype | None

    @staticmethod
    def of(weight: Tensor, quant_state: Any, compute_dtype: torch.dtype | None) -> Bnb4bitWeight:
        """Read a weight for which `why_not` has no objection."""
        nested = quant_state.state2
        packed = Packed4bit(
            packed=_bytes(weight),
            absmax=quant_state.absmax if nested else quant_state.absmax.float(),
            shape=(quant_state.shape[0], quant_state.shape[1]),
            dtype=quant_state.dtype,
            blocksize=quant_state.blocksize,
            quant_type=quant_state.quant_type,
            nested_code=nested.code.float() if nested else None,
            nested_absmax=nested.absmax.float() if nested else None,
            # Old checkpoints hold it in bfloat16 (bitsandbytes issue 1971).
            nested_offset=quant_state.offset.float().reshape(1) if nested else None,
            nested_blocksize=nested.blocksize if nested else 256,
        )
        return Bnb4bitWeight(packed, compute_dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def is_quantised(self) -> bool:
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        w = self.packed
        nested = (w.nested_code, w.nested_absmax, w.nested_offset)
        return (w.packed, w.absmax, *(tensor for tensor in nested if tensor is not None))

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.compute,)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Bnb4bitWeight:
        w, (packed, absmax, *nested) = self.packed, tensors
        code, nested_absmax, offset = nested or (None, None, None)
        scales = (code, nested_absmax, offset, w.nested_blocksize)
        again = Packed4bit(packed, absmax, w.shape, w.dtype, w.blocksize, w.quant_type, *scales)
        return Bnb4bitWeight(again, self.compute)

    def compute_dtype(self, x: Tensor, cast: torch.dtype | None = None) -> torch.dtype:
        return cast or self.compute or x.dtype

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return x.dtype  # Linear4bit.forward casts back to its input's dtype, under autocast too

    def gradient_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return compute

    def linear(self, x: Tensor, *, stored: bool = False, onto: Tensor | None = None) -> Tensor:
        values = self.packed.dtype if stored else x.dtype
        if not self.has_room(x):
            return matmul_4bit(x, self.packed, values=values, out=onto, accumulate=onto is not None)
        weight = self._copy(x, values, gradient=False)
        return F.linear(x, weight) if onto is None else onto.addmm_(x, weight.t())

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        values = self.packed.dtype if stored else dy.dtype
        if not self.has_room(dy):
            added = dx is not None
            return matmul_4bit(dy, self.packed, transposed=True, values=values, out=dx, accumulate=added)
        weight = self._copy(dy, values, gradient=True)
        return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)

    def has_room(self, x: Tensor) -> bool:
        return x.device.type in _dense_copy.GPUS and x.shape[0] > FEW_ROWS_GPU

    def copy_with_room(self, x: Tensor, *, gradient: bool) -> Tensor:
        return _dense_copy.dense_copy(self.packed, x.dtype, x.dtype, gradient=gradient)

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return dora_norm(self.packed, a, b, scale)

    def dequantize(self, out: Tensor) -> Tensor:
        return dequant_4bit(self.packed, out=out)

    def _copy(self, x: Tensor, values: torch.dtype, *, gradient: bool) -> Tensor:
        copy = _dense_copy.dense_copy(self.packed, x.dtype, values, gradient=gradient)
        return copy[: self.shape[0], : self.shape[1]]


def _bytes(weight: Tensor) -> Tensor:
    """The packed bytes of a Params4bit as a plain, flat uint8 tensor; its storage dtype may be bfloat16 or
    float32.
    """
    return weight.data.view(-1).view(torch.uint8)
