"""An adapter inside its base layer's GEMM: `[x, S] [W, B]^T` for y, `[dy, dS] [W; A]` for dx.

One vendor GEMM with 64 columns more takes the place of a GEMM and the pass before it, which writes its
output. A bfloat16 S is a column per rank. A float32 one goes in as two, so that 16 of its bits count; they
meet B, or of a float32 B the high half and, in a third column, its low half. The output is rounded once. It
needs a weight whose copy has room for the columns.

What it saves are bytes. Written first, the adapter's part costs a write and a read of the output; in the GEMM
it costs a copy of the input with room, and the columns' share of the tensor cores' time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.weights import ROOM

# 64 columns of a GEMM in bytes of copying per element of its output: 0.31 on an H200, 0.43 on an A100, 0.35
# on an RTX 4090, from their tensor rate and bandwidth.
COLUMNS_IN_BYTES = 0.35
# What the adapter's part costs an element's bytes of the output: 26 us to write it and 5 us of the GEMM's
# reading it, of 67 MB; and a copy with room: 40 us. All at the rate of a plain copy, 36 us for 134 MB.
FIRST, COPIED = 1.7, 2.2
# What the launches that make the tails cost: 20 us.
LAUNCHES_IN_BYTES = 80e6


def pays(rows: Tensor, outputs: int, s: Tensor, factor: Tensor) -> bool:
    """Whether the product of rows [T, K] that makes [T, outputs] should take s factor^T along, if it can."""
    if rows.dtype != torch.bfloat16 or s.shape[1] * len(_halves_that_meet(rows.dtype, s, factor)) > ROOM:
        return False
    tokens, inputs = rows.shape
    first, copied = FIRST * rows.element_size() * outputs, COPIED * rows.element_size() * inputs
    return tokens * (first - copied - COLUMNS_IN_BYTES * outputs) > LAUNCHES_IN_BYTES


def linear(copy: Tensor, rows: Tensor, s: Tensor, factor: Tensor) -> Tensor:
    """rows W^T + s factor^T [T, O], with W in the corner of copy [O + ROOM, I + ROOM].

    rows [T, I] bfloat16, s [T, R] bfloat16 or float32, factor [O, R] of any float dtype.
    """
    outputs = factor.shape[0]
    copy[:outputs, rows.shape[1] :] = _tail(rows.dtype, s, factor)
    return _with_tail(rows, s, factor) @ copy[:outputs].t()


def input_grad(copy: Tensor, rows: Tensor, s: Tensor, factor: Tensor, dx: Tensor | None) -> Tensor:
    """rows W + s factor [T, I], with W as in `linear`: new, or added to dx in place.

    rows [T, O] bfloat16, s [T, R] bfloat16 or float32, factor [R, I] of any float dtype.
    """
    inputs = factor.shape[1]
    copy[rows.shape[1] :, :inputs] = _tail(rows.dtype, s, factor.t()).t()
    wide, weight = _with_tail(rows, s, factor), copy[:, :inputs]
    return torch.mm(wide, weight) if dx is None else dx.addmm_(wide, weight)


def _halves_that_meet(dtype: torch.dtype, s: Tensor, factor: Tensor) -> list[tuple[int, int]]:
    """Which half (0 high, 1 low) of s stands in each group of columns, and which of the factor meets it."""
    low_s, low_factor = s.dtype != dtype, factor.dtype != dtype
    return [(0, 0)] + [(1, 0)] * low_s + [(0, 1)] * low_factor


def _with_tail(rows: Tensor, s: Tensor, factor: Tensor) -> Tensor:
    """[rows, halves of s, zeros] [T, K + ROOM]."""
    tokens, inputs = rows.shape
    wide = torch.empty(tokens, inputs + ROOM, dtype=rows.dtype, device=rows.device)
    wide[:, :inputs] = rows
    halves = _halves(s, rows.dtype)
    _fill(wide[:, inputs:], [halves[left] for left, _ in _halves_that_meet(rows.dtype, s, factor)])
    return wide


def _tail(dtype: torch.dtype, s: Tensor, factor: Tensor) -> Tensor:
    """The factor's halves beside what `_with_tail` has in these columns, [outputs, ROOM]."""
    tail = torch.empty(factor.shape[0], ROOM, dtype=dtype, device=factor.device)
    halves = _halves(factor, dtype)
    return _fill(tail, [halves[right] for _, right in _halves_that_meet(dtype, s, factor)])


def _fill(to: Tensor, groups: list[Tensor]) -> Tensor:
    used = sum(group.shape[1] for group in groups)
    to[:, :used] = torch.cat(groups, dim=1)
    to[:, used:] = 0
    return to


def _halves(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if value.dtype == dtype:
        return (value,)
    high = value.to(dtype)
    return high, (value - high).to(dtype)
