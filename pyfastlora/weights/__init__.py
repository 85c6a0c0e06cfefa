"""Frozen base weights: one file per storage format, one protocol for all.

A fused region asks a weight for four things and never looks at how it is stored. To add a format: one file
here with a class of this protocol and a `why_not` that says what it cannot take, and a line in
`patching/read.py` that makes it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class FrozenWeight(Protocol):
    """W [O, I], not trained. Methods take and give rows: x [T, I], dy [T, O], packed columns, in a dtype of
    choice.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward pass needs of it, to go through `save_for_backward`."""
        ...

    def rebuild(self, tensors: tuple[Tensor, ...]) -> FrozenWeight:
        """The same weight around `tensors` that came back."""
        ...

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """What the base layer multiplies in when autocast is off."""
        ...

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        """What the base layer returns for x when it multiplies in `compute`."""
        ...

    def linear(self, x: Tensor, *, stored: bool = False) -> Tensor:
        """x W^T [T, O] in x's dtype, new. A quantised W is decoded to x's dtype, `stored`: to its own dtype
        first.

        The base layer does the former, PEFT's DoRA the latter
        (peft.utils.integrations.dequantize_module_weight).
        """
        ...

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        """dy W [T, I] in dy's dtype: new, or added to dx in place. `stored` as in `linear`."""
        ...

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """||W_o + scale (b a)_o|| [O], float32 or wider."""
        ...

    def dequantize(self, out: Tensor) -> Tensor:
        """Write W into out [O, I] of any float dtype."""
        ...
