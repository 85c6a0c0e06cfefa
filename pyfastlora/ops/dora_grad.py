"""dora_grad: the magnitude's part of DoRA's backward pass, in one pass over dy and z.

    dz = dy * gain,   dgain = sum over tokens of dy * z         gain = magnitude / norm, z the unscaled sum

float32 inside (float64 for float64 tensors). Source: Liu et al. 2024 (DoRA), section 4.3: the norm is a
constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import check_same, like, rows_of
from pyfastlora.ops._triton import triton_implementation


def dora_grad(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz [..., O] in dy's dtype, dgain [O] float32, or float64): dy and z [..., O], gain [O].

    dy and z are read in place where their columns are packed, else copied. Raises ValueError when they
    differ in shape, dtype or device.
    """
    check_same("dora_grad", z=z, dy=dy)
    dz, dgain = OP.pick(z)(rows_of(dy), rows_of(z), gain)
    return like(dy, dz), dgain


def reference(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(z.dtype, torch.float32)
    wide_dy = dy.to(wide)
    return (wide_dy * gain.to(wide)).to(dy.dtype), (wide_dy * z.to(wide)).sum(0)


def native(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dgain = torch.empty(z.shape[1], dtype=torch.float32, device=z.device)
    torch.ops.pyfastlora.dora_grad.default(dy, z, gain.float().contiguous(), dz, dgain)
    return dz, dgain


OP = Op(
    "dora_grad",
    Implementation("gpu", native, why_not_gpu),
    triton_implementation("dora_grad", "dora_grad"),
    Implementation("cpu", native, why_not_cpu),
    Implementation("reference", reference, always),
)
