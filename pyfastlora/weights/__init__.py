"""Frozen base weights: one file per storage format, one protocol for all.

A fused region asks a weight for its products and its norms, and never looks at how it is stored. To add a
format: one file here with a class of this protocol and a `why_not` that says what it cannot take, and a line
in `patching/read.py` that makes it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

#: Spare columns and rows of a weight's copy. One step of a vendor GEMM's main loop: up to that many cost one.
ROOM = 64


class FrozenWeight(Protocol):
    """W [O, I], not trained. Methods take and give rows: x [T, I], dy [T, O], packed columns, in a dtype of
    choice.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    @property
    def is_quantised(self) -> bool:
        """Whether PEFT's layer is one of those for quantised weights."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward pass needs of it, to go through `save_for_backward`."""
        ...

    @property
    def settings(self) -> tuple[object, ...]:
        """What its products depend on besides the tensors."""
        ...

    def rebuild(self, tensors: tuple[Tensor, ...]) -> FrozenWeight:
        """The same weight around `tensors` that came back."""
        ...

    def compute_dtype(self, x: Tensor, cast: torch.dtype | None = None) -> torch.dtype:
        """What the base layer multiplies in; `cast` is autocast's dtype where it is on."""
        ...

    def output_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        """What the base layer returns for x when it multiplies in `compute`."""
        ...

    def gradient_dtype(self, x: Tensor, compute: torch.dtype) -> torch.dtype:
        """What dx of a product in `compute` is multiplied in."""
        ...

    def linear(self, x: Tensor, *, stored: bool = False, onto: Tensor | None = None) -> Tensor:
        """x W^T [T, O] in x's dtype: new, or added to `onto` in place. A quantised W is decoded to x's dtype,
        `stored`: to its own dtype first.

        The base layer does the former, PEFT's DoRA the latter
        (peft.utils.integrations.dequantize_module_weight).
        """
        ...

    def input_grad(self, dy: Tensor, dx: Tensor | None = None, *, stored: bool = False) -> Tensor:
        """dy W [T, I] in dy's dtype: new, or added to dx in place. `stored` as in `linear`."""
        ...

    def has_room(self, x: Tensor) -> bool:
        """Whether x is multiplied with a copy of W that `copy_with_room` can make."""
        ...

    def copy_with_room(self, x: Tensor, *, gradient: bool) -> Tensor:
        """W in the corner of a scratch [O + ROOM, I + ROOM] of x's dtype.

        For a forward product or, `gradient`, for dx. Valid until the thread asks for the next.
        """
        ...

    def norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """||W_o + scale (b a)_o|| [O], float32 or wider."""
        ...

    def dequantize(self, out: Tensor) -> Tensor:
        """Write W into out [O, I] of any float dtype."""
        ...
