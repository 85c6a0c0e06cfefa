"""Products with packed weights on a CPU: decoded a panel at a time into reused memory, and multiplied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyfastlora.ops._arena import scratch

# Bytes of W decoded at a time. Smaller panels stay closer to the core but starve the vendor's GEMM of
# columns: [4096, 4096] bfloat16, T = 512: 13.6, 11.7, 8.9, 9.3 ms at 1, 2, 8, 32 MiB on two Xeon cores
# (bench_matmul_4bit).
PANEL_BYTES = 8 << 20

#: A half-open range of rows or columns.
Span = tuple[int, int]
#: Writes W, or its range of rows or of columns, into a tensor.
Panel = Callable[[Span | None, Span | None, Tensor], object]


def multiply(x: Tensor, w: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = x w, or out += x w: rounded once, by a GEMM with beta = 1."""
    if accumulate:
        out.addmm_(x, w)
    else:
        torch.mm(x, w, out=out)


def multiply_in_panels(
    x: Tensor, shape: tuple[int, int], panel: Panel, out: Tensor, *, transposed: bool, accumulate: bool
) -> None:
    """As `multiply`, x W^T, or x W when `transposed`, with W of `shape` [O, I] in x's dtype."""
    rows, cols = shape
    outer, inner = (cols, rows) if transposed else (rows, cols)
    for begin, end in spans(outer, inner * x.element_size()):
        span = (begin, end)
        size = (rows, end - begin) if transposed else (end - begin, cols)
        part = scratch(size, x.dtype, x.device)
        panel(None if transposed else span, span if transposed else None, part)
        multiply(x, part if transposed else part.t(), out[:, begin:end], accumulate)


def spans(length: int, width: int) -> list[Span]:
    """[0, length) in ranges of about PANEL_BYTES, where each element is `width` bytes wide."""
    step = max(64, PANEL_BYTES // max(1, width) // 64 * 64)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]
