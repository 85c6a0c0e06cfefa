"""Shapes and layouts common to the ops: tensors as rows, and the sentences when they do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """x [..., C] as [T, C] with packed columns: a view where the layout allows it, else a copy."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a dtype: `Tensor.to`, which takes 3 us to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def written_rows(op: str, out: Tensor, shape: Sequence[int]) -> Tensor:
    """out [..., C] as [T, C], to be written: a view. Raises ValueError unless it has the shape and can be."""
    if tuple(out.shape) == tuple(shape) and (out.stride(-1) == 1 or out.shape[-1] <= 1):
        if out.dim() == 2:
            return out
        if out.is_contiguous():
            return out.view(-1, out.shape[-1])
    raise ValueError(
        f"{op}: out must be {list(shape)} with packed columns, or contiguous if it has other than two "
        f"dimensions; got {list(out.shape)} with strides {list(out.stride())}"
    )


def like(x: Tensor, rows: Tensor) -> Tensor:
    """rows [T, C], one per row of x [..., I], as [..., C]."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[1])


def stack(factors: Sequence[Tensor]) -> Tensor:
    """Factors [R_i, I] below one another, in a dtype that holds them all: a neighbour's would round them."""
    if len(factors) == 1:
        return factors[0]
    dtype = factors[0].dtype
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    return torch.cat([factor.to(dtype) for factor in factors])


def check_same(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the first one's shape, dtype and device, and at least one
    dimension.
    """
    (first_name, first), *others = tensors.items()
    if first.dim() == 0:
        raise ValueError(f"{op}: {first_name} must have at least one dimension; got a scalar")
    for name, tensor in others:
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"{op}: {name} must be {describe(first)} like {first_name}; got {describe(tensor)}"
            )


def describe(x: Tensor) -> str:
    """ "[3, 4] float32 on cpu"."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
