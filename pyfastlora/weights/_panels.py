"""DoRA's norm of a weight that has no packed rows as it lies: copied out a panel of columns at a time.

||W_o + s (B A)_o||^2 = sum over panels P of ||W_oP + s (B A_P)_o||^2
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyfastlora.ops import dora_norm
from pyfastlora.ops._arena import scratch
from pyfastlora.ops._panels import Span, spans


def norm_in_panels(
    shape: tuple[int, int],
    dtype: torch.dtype,
    panel: Callable[[Span, Tensor], object],
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """||W_o + scale (b a)_o|| [O], float32 or wider, with W [O, I] in `dtype`; panel(cols, out) writes W's
    columns into out [O, n].
    """
    outputs, inputs = shape
    squares = torch.zeros(outputs, dtype=torch.promote_types(dtype, torch.float32), device=b.device)
    for begin, end in spans(inputs, outputs * dtype.itemsize):
        part = scratch((outputs, end - begin), dtype, b.device)
        panel((begin, end), part)
        squares.add_(dora_norm(part, a[:, begin:end].contiguous(), b, scale).square_())
    return squares.sqrt_()
