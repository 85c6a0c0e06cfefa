"""Shapes and layouts common to the ops: tensors as rows, and the sentences when they do not fit."""

from __future__ import annotations

from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """x [..., C] as [T, C] with packed columns: a view where the layout allows it, else a copy."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


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
