"""dora_grad: the magnitude's part of DoRA's backward pass, in one pass over dy and z.

    dz = dy * gain,   dgain = sum over tokens of dy * z         gain = magnitude / norm, z the unscaled sum

float32 inside (float64 for float64 tensors). Source: Liu et al. 2024 (DoRA), section 4.3: the norm is a
constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu
from pyfastlora.ops._shapes import check_same


def dora_grad(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dz [T, O] in dy's dtype, dgain [O] float32, or float64): dy and z [T, O] with packed columns, gain
    [O].

    Raises ValueError when dy and z differ in shape, dtype or device.
    """
    check_same("dora_grad", z=z, dy=dy)
    return OP.pick(z)(dy, z, gain)


def reference(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(z.dtype, torch.float32)
    wide_dy = dy.to(wide)
    return (wide_dy * gain.to(wide)).to(dy.dtype), (wide_dy * z.to(wide)).sum(0)


def cpu(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    dz, dgain = torch.empty(dy.shape, dtype=dy.dtype), torch.empty(z.shape[1], dtype=torch.float32)
    torch.ops.pyfastlora.dora_grad(dy, z, gain.float().contiguous(), dz, dgain)
    return dz, dgain


OP = Op("dora_grad", Implementation("cpu", cpu, why_not_cpu), Implementation("reference", reference, always))
