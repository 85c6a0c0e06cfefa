"""Rank-r products by the GPU vendor's GEMM: operands of one 16-bit dtype, and nothing to drop out.

There they take the time of a copy; kernels that keep float32's digits of S take twice that. On an H200, 8192
rows of 4096 bfloat16s and 16 ranks: x A^T 26 us against our kernel's 57, dS and dB 56 against 59, dA 29
against 55, S B^T 26 against 65; with 64 ranks 27, 57, 30 and 24 against 71, 229, 107 and 98. Sums are float32
(but for what torch.backends.cuda.matmul allows), rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)


def takes(first: torch.dtype, *others: torch.dtype) -> bool:
    """Whether operands and results are of one 16-bit dtype."""
    return first in DTYPES and others.count(first) == len(others)


def gives(dtype: torch.dtype, a: Tensor) -> bool:
    """Whether products of `a` come in this dtype: its own, or float32, as CUDA's GEMM writes its sums."""
    if dtype == a.dtype:
        return True
    return dtype == torch.float32 and a.device.type == "cuda" and torch.version.hip is None


def product(a: Tensor, b: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """scale * a b [M, N] of a [M, K] and b [K, N], in their dtype or in `dtype`. New tensor."""
    if dtype is not None and dtype != a.dtype:
        wide = torch.mm(a, b, out_dtype=dtype)
        return wide if scale == 1 else wide.mul_(scale)
    if scale == 1:
        return torch.mm(a, b)
    return product_into(a.new_empty(a.shape[0], b.shape[1]), a, b, scale)


def product_into(out: Tensor, a: Tensor, b: Tensor, scale: float, offset: Tensor | None = None) -> Tensor:
    """out = scale * a b + offset [N], all of one dtype."""
    if torch.compiler.is_compiling():  # inductor multiplies what beta = 0 is to leave unread: NaN by 0
        value = torch.mm(a, b) * scale
        return out.copy_(value if offset is None else value + offset)
    if offset is not None:
        return torch.addmm(offset, a, b, alpha=scale, out=out)
    if scale == 1:
        return torch.mm(a, b, out=out)
    return out.addmm_(a, b, beta=0, alpha=scale)
