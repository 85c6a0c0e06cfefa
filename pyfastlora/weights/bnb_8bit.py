"""8-bit weights of bitsandbytes (LLM.int8): `Int8Params` with the `MatmulLtState` of its Linear8bitLt.

    W[o, i] = CB[o, i] * SCB[o] / 127

Training on a CPU, the layer multiplies with W in float. Everywhere else it quantises x as well, row by row,
keeps the columns with outliers apart and multiplies integers: that product is left to bitsandbytes, whose
ops are loaded where such a weight exists. Its gradient is dy W in float either way. Sources: Dettmers et al.
2022; bitsandbytes/autograd/_functions.py (matmul, MatMul8bitFp, MatMul8bitLt) and nn/modules.py
(Linear8bitLt).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastlora.ops import Packed8bit, dequant_8bit
from pyfastlora.ops._arena import scratch
from pyfastlora.ops._panels import Span, multiply, multiply_in_panels
from pyfastlora.weights._panels import norm_in_panels


def why_not(weight: Tensor, state: Any) -> str | None:
    """Why this weight cannot be taken, or None."""
    if state.has_fp16_weights:
        return "the 8-bit layer keeps its weight in float (has_fp16_weights) and quantises it at every call"
    values, scales = _stored(weight, state)
    if values.dtype != torch.int8:
        return "the 8-bit weight is not quantised yet: move the model to its device first"
    if scales is None:
        return "the 8-bit weight has no scales (SCB)"
    if values.dim() != 2 or scales.shape != values.shape[:1] or scales.dtype != torch.float32:
        return f"the 8-bit weight {list(values.shape)} has {list(scales.shape)} scales in {scales.dtype}"
    return None


def multiplies_integers(weight: Tensor, training: bool) -> bool:
    """Whether the base layer, in training mode or not, quantises x too."""
    return not (training and weight.device.type in ("cpu", "xpu"))


@dataclass(frozen=True, slots=True)
class Bnb8bitWeight:
    """W [O, I] as rows of int8 with a scale each. `threshold` of the integer product; None: float ones."""

    packed: Packed8bit
    threshold: float | None

    @staticmethod
    def of(weight: Tensor, state: Any, training: bool) -> Bnb8bitWeight:
        """Read a weight for which `why_not` has no objection; `training` is its layer's mode."""
        values, scales = _stored(weight, state)
        assert scales is not None
        threshold = state.threshold if multiplies_integers(weight, training) else None
        # float32: what bitsandbytes and PEFT decode to, whatever the weight was before
        return Bnb8bitWeight(Packed8bit(values, scales, torch.float32), threshold)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def is_quantised(self) -> bool:
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.packed.values, self.packed.absmax)

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.threshold,)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Bnb8bitWeight:
        values, absmax = tensors
        return Bnb8bitWeight(Packed8bit(values, absmax, self.packed.dtype), self.threshold)

    def compute_dtype(self, x: Tensor, cast: torch.dtype | None = None) -> torch.dtype:
        return x.dtype if self.threshold is not None else cast or x.dtype

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return compute

    def gradient_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        return x.dtype  # bitsandbytes multiplies dy in what its forward was given, under autocast too

    def linear(self, x: Tensor, *, stored: bool = False, onto: Tensor | None = None) -> Tensor:
        if self.threshold is None or stored:
            return self._product(x, onto, transposed=False)
        y = self._integers(x)
        return y if onto is None else onto.add_(y)

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        return self._product(dy, dx, transposed=True)

    def has_room(self, x: Tensor) -> bool:
        return False

    def copy_with_room(self, x: Tensor, *, gradient: bool) -> Tensor:
        raise AssertionError("an 8-bit weight's copy has no room")

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        def panel(cols: Span, out: Tensor) -> None:
            dequant_8bit(self.packed, cols=cols, out=out)

        return norm_in_panels(self.shape, torch.float32, panel, a, b, scale)

    def dequantize(self, out: Tensor) -> Tensor:
        return dequant_8bit(self.packed, out=out)

    def _product(self, x: Tensor, onto: Tensor | None, *, transposed: bool) -> Tensor:
        """x W^T, or x W, in x's dtype: in panels that stay in a CPU's caches, through one copy on a GPU."""
        accumulate = onto is not None
        out = x.new_empty(x.shape[0], self.shape[1 if transposed else 0]) if onto is None else onto
        if x.device.type != "cpu":
            dense = dequant_8bit(self.packed, out=scratch(self.shape, x.dtype, x.device))
            multiply(x, dense if transposed else dense.t(), out, accumulate)
            return out

        def panel(rows: Span | None, cols: Span | None, out: Tensor) -> None:
            dequant_8bit(self.packed, rows=rows, cols=cols, out=out)

        multiply_in_panels(x, self.shape, panel, out, transposed=transposed, accumulate=accumulate)
        return out

    def _integers(self, x: Tensor) -> Tensor:
        """bitsandbytes' own x W^T, in x's dtype."""
        if x.numel() == 0:
            return x.new_zeros(x.shape[0], self.shape[0])
        ops, (values, scales) = torch.ops.bitsandbytes, self.tensors
        # a copy on CPUs, where the outliers of what is quantised are zeroed in place for a while
        half = x.to(torch.float16, copy=x.device.type == "cpu")
        quantised, absmax, outliers = ops.int8_vectorwise_quant(half, self.threshold)
        if self.threshold:
            return ops.int8_mixed_scaled_mm(x, quantised, values, absmax, scales, outliers, None)[0]
        return ops.int8_scaled_mm(quantised, values, absmax, scales, bias=None, dtype=x.dtype)


def _stored(weight: Any, state: Any) -> tuple[Tensor, Tensor | None]:
    """CB and SCB. They move from the weight to its layer's state in the first forward."""
    values, scales = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    values = state.CB if values is None else values
    return weight.data if values is None else values, state.SCB if scales is None else scales
