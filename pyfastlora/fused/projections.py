"""Adapted linears that share one input, as one autograd node.

Forward, for each projection i of x [T, I] (D: dropout, s: scaling, g = m / ||W + s B A||, m: DoRA's
magnitude):

    LoRA             y = x W^T + s (D(x) A^T) B^T + (b + s b_B)
    DoRA             y = g (x W^T + s (x A^T) B^T) + b
    DoRA, dropout    y = x W^T + (g - 1) D(x) W^T + g s (D(x) A^T) B^T + b

Backward, with S = D(x) A^T, G = dy^T S, u the base product that g multiplies (x W^T, or D(x) W^T under
dropout), and the norm a constant as in PEFT:

    dB = s g G                 dS = s dy (g B)            dA = dS^T D(x)          db = sum dy,  db_B = s sum
    dy dm = (sum_t dy u + s <B, G>) / norm                   dx = (g dy) W + D(dS A), summed over the
    projections

The rank-r products and every sum are float32 (float64 for float64 inputs), rounded once where they meet an
output: at least as exact as PEFT's. Saved: x itself (shared with the caller), S [T, r] float32, the dropout
mask as bits (1/16 of a bfloat16 x), for DoRA u [T, O]. Not differentiable twice. Sources: Hu et al. 2021, Liu
et al. 2024, and for each rounding and cast peft/tuners/lora/{layer,bnb,dora,variants}.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastlora.ops import (
    DropoutMask,
    dora_grad,
    dropout_apply,
    dropout_mask,
    lora_expand,
    lora_grad,
    lora_shrink,
    lora_shrink_many,
)
from pyfastlora.ops._registry import requests, requests_in_force
from pyfastlora.ops._shapes import rows_of
from pyfastlora.weights import FrozenWeight


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear of the region: the frozen weight W [O, I] and what PEFT adds to it.

    lora_A [r, I] and lora_B [O, r] come together or not at all. `dropout` is the probability in force for
    this call (0 in eval mode). `lora_bias` [O] is multiplied by `scaling`, as PEFT does; it does not go with
    DoRA's `magnitude` [O].
    """

    weight: FrozenWeight
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815  (PEFT's names)
    lora_B: Tensor | None = None  # noqa: N815
    lora_bias: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None


def fused_projections(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """The outputs [..., O_i] of `projections` for x [..., I], with one node in the graph.

    The output's dtype is the base layer's: autocast's where it is on, else the weight's (4-bit: x's). Dropout
    masks are drawn in the order of `projections` from torch's default generator. Raises ValueError for
    tensors that do not fit.
    """
    tensors: list[Tensor | None] = []
    for projection in projections:
        _check(x, projection)
        tensors += _trainable(projection)
    return list(_FusedProjections.apply(x, tuple(projections), *tensors))


PER_PROJECTION = 5


def _trainable(p: Projection) -> tuple[Tensor | None, ...]:
    return p.bias, p.lora_A, p.lora_B, p.lora_bias, p.magnitude


def _check(x: Tensor, p: Projection) -> None:
    outer, inner = p.weight.shape
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ValueError(
            f"fused_projections: x must end in {inner} columns for W {[outer, inner]}; got {list(x.shape)}"
        )
    if (p.lora_A is None) != (p.lora_B is None):
        raise ValueError("fused_projections: lora_A and lora_B come together; one of them is missing")
    if p.lora_A is None or p.lora_B is None:
        if p.magnitude is not None or p.lora_bias is not None:
            raise ValueError("fused_projections: magnitude and lora_bias need lora_A and lora_B")
        return
    ranks = p.lora_A.shape[0]
    if tuple(p.lora_A.shape) != (ranks, inner) or tuple(p.lora_B.shape) != (outer, ranks):
        raise ValueError(
            f"fused_projections: lora_A [r, I] and lora_B [O, r] must fit W {[outer, inner]}; "
            f"got {list(p.lora_A.shape)} and {list(p.lora_B.shape)}"
        )
    if p.magnitude is not None and p.lora_bias is not None:
        raise ValueError("fused_projections: DoRA with a bias on lora_B is not a formula of PEFT's forward")


@dataclass(slots=True)
class _Kept:
    """What one projection keeps from forward to backward. Tensors leave it for `save_for_backward`."""

    compute: torch.dtype  # the base product's
    wide: torch.dtype | None = None  # DoRA with dropout: of the second base product
    s: Tensor | None = None  # S = D(x) A^T [T, r]
    mask: DropoutMask | None = None
    base: Tensor | None = None  # u [T, O]
    norm: Tensor | None = None  # [O]


class _FusedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = rows_of(x)
        with _no_autocast(x) as cast:
            kept = [_Kept(cast or p.weight.compute_dtype(x)) for p in projections]
            for p, k in zip(projections, kept, strict=True):
                if p.lora_A is not None and p.dropout > 0:
                    k.mask = dropout_mask(x, p.dropout)
            _shrink(rows, projections, kept)
            outputs = [_forward(rows, x, p, k) for p, k in zip(projections, kept, strict=True)]
        saved: list[Tensor | None] = [x, *tensors]
        for p, k in zip(projections, kept, strict=True):
            saved += [k.s, k.mask.bits if k.mask else None, k.base, k.norm, *p.weight.tensors]
        ctx.save_for_backward(*saved)
        ctx.projections = projections
        ctx.plan = [(k.compute, k.wide, k.mask.scale if k.mask else 1.0) for k in kept]
        ctx.requests = requests_in_force()
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        projections, kept, count = [], [], PER_PROJECTION * len(ctx.projections)
        tensors, rest = saved[:count], saved[count:]
        for i, (p, (compute, wide, scale)) in enumerate(zip(ctx.projections, ctx.plan, strict=True)):
            bias, a, b, lora_bias, magnitude = tensors[PER_PROJECTION * i : PER_PROJECTION * (i + 1)]
            (s, bits, base, norm), rest = rest[:4], rest[4:]
            held, rest = rest[: len(p.weight.tensors)], rest[len(p.weight.tensors) :]
            weight = p.weight.rebuild(tuple(held))
            projections.append(Projection(weight, bias, a, b, lora_bias, p.scaling, p.dropout, magnitude))
            mask = None if bits is None else DropoutMask(bits, scale)
            kept.append(_Kept(compute, wide, s, mask, base, norm))
        with _no_autocast(x), requests(ctx.requests):
            return _backward(x, projections, kept, grads, ctx.needs_input_grad)


# ---- forward
# --------------------------------------------------------------------------------------------------------


def _shrink(rows: Tensor, projections: Sequence[Projection], kept: list[_Kept]) -> None:
    """Fill `s` of every adapted projection; those without a mask share one pass over x."""
    plain: list[_Kept] = []
    factors: list[Tensor] = []
    for p, k in zip(projections, kept, strict=True):
        if p.lora_A is None:
            continue
        if k.mask is None:
            plain.append(k)
            factors.append(p.lora_A)
        else:
            k.s = lora_shrink(rows, p.lora_A, mask=k.mask)
    if factors:
        for k, s in zip(plain, lora_shrink_many(rows, factors), strict=True):
            k.s = s


def _forward(rows: Tensor, x: Tensor, p: Projection, k: _Kept) -> Tensor:
    """y [T, O]; fills `base`, `norm` and `wide`."""
    y = p.weight.linear(rows.to(k.compute))
    dtype = p.weight.output_dtype(x, k.compute)
    if y.dtype != dtype:
        y = y.to(dtype)
    if p.lora_A is None or p.lora_B is None or k.s is None:
        return y if p.bias is None else y.add_(p.bias)
    if p.magnitude is None:
        return lora_expand(y, k.s, p.lora_B, scale=p.scaling, offset=_offset(p, k.s.dtype))
    k.norm = p.weight.norm(p.lora_A, p.lora_B, p.scaling)
    gain = p.magnitude.to(k.norm.dtype) / k.norm
    if k.mask is None:
        k.base = y  # kept without the adapter's part: <B, G> gives that exactly, and y has one rounding less
        return lora_expand(
            y, k.s, p.lora_B, scale=p.scaling, gain=gain, offset=p.bias, out=torch.empty_like(y)
        )
    # PEFT's second product runs in the dtype of its dropped-out copy of x: the adapter's, unless autocast is
    # on.
    k.wide = (
        k.compute if k.compute != p.weight.compute_dtype(x) else torch.promote_types(x.dtype, p.lora_A.dtype)
    )
    dropped = dropout_apply(rows.to(torch.promote_types(x.dtype, k.wide)), k.mask).to(k.wide)
    k.base = p.weight.linear(dropped, stored=True)
    total = torch.addcmul(y.to(k.norm.dtype), k.base.to(k.norm.dtype), gain - 1)
    return lora_expand(total, k.s, p.lora_B * gain[:, None], scale=p.scaling, offset=p.bias).to(y.dtype)


def _offset(p: Projection, wide: torch.dtype) -> Tensor | None:
    """b + s b_B in float32 or wider: what is added after the adapter."""
    if p.lora_bias is None:
        return p.bias
    scaled = p.lora_bias.to(wide) * p.scaling
    return scaled if p.bias is None else scaled + p.bias.to(wide)


# ---- backward
# -------------------------------------------------------------------------------------------------------


def _backward(
    x: Tensor,
    projections: list[Projection],
    kept: list[_Kept],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Any, ...]:
    rows = rows_of(x)
    dx: Tensor | None = None
    out: list[Tensor | None] = []
    low_rank: list[
        tuple[Tensor, Tensor, DropoutMask | None]
    ] = []  # (dS, A, mask): dx's low-rank part, added last
    for i, (p, k, grad) in enumerate(zip(projections, kept, grads, strict=True)):
        wanted = needs[2 + PER_PROJECTION * i : 2 + PER_PROJECTION * (i + 1)]
        if grad is None:
            out += [None] * PER_PROJECTION
            continue
        dy = rows_of(grad)
        dx, ds, own = _backward_one(rows, dy, p, k, wanted, needs[0], dx)
        out += own
        if ds is not None and p.lora_A is not None and needs[0]:
            low_rank.append((ds, p.lora_A, k.mask))
    if needs[0] and dx is not None:
        dx = dx.to(torch.promote_types(dx.dtype, x.dtype))  # the wider one until everything is in
        for ds, a, mask in low_rank:
            lora_expand(dx, ds, a, transposed=True, mask=mask)
        dx = dx.to(x.dtype).view(x.shape)
    return (dx if needs[0] else None, None, *out)


def _backward_one(
    rows: Tensor,
    dy: Tensor,
    p: Projection,
    k: _Kept,
    wanted: Sequence[bool],
    wants_dx: bool,
    dx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """(dx with this projection's base part added, dS, gradients of bias, A, B, b_B, m)."""
    wants_bias, wants_a, wants_b, wants_lora_bias, wants_m = wanted
    gain = None if p.magnitude is None or k.norm is None else p.magnitude.to(k.norm.dtype) / k.norm
    d_a = d_b = ds = d_m = None
    dz, dgain = dy, None
    if gain is not None and k.base is not None:
        factor = gain if k.mask is None else gain - 1
        dz, dgain = dora_grad(dy.to(k.base.dtype), k.base, factor)
    if k.s is not None and p.lora_A is not None and p.lora_B is not None:
        if wants_b or wants_m:
            g = lora_grad(k.s, dy).t()  # [O, r]
            if wants_b:
                d_b = (g * p.scaling if gain is None else g * (gain * p.scaling)[:, None]).to(p.lora_B.dtype)
            if wants_m and p.magnitude is not None and dgain is not None and k.norm is not None:
                adapter = p.scaling * (p.lora_B.to(g.dtype) * g).sum(1)
                d_m = ((dgain + adapter) / k.norm).to(p.magnitude.dtype)
        if wants_a or wants_dx:
            factor_b = p.lora_B if gain is None else p.lora_B * gain[:, None]
            ds = lora_shrink(dy, factor_b, transposed=True, scale=p.scaling)
            if wants_a:
                d_a = lora_grad(ds, rows, mask=k.mask).to(p.lora_A.dtype)
    if wants_dx:
        dx = _add_base_grad(dy, dz, p, k, dx)
    total = (
        dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if wants_bias or wants_lora_bias
        else None
    )
    d_bias = total.to(p.bias.dtype) if wants_bias and total is not None and p.bias is not None else None
    d_lora_bias = (
        (total * p.scaling).to(p.lora_bias.dtype)
        if wants_lora_bias and total is not None and p.lora_bias is not None
        else None
    )
    return dx, ds, [d_bias, d_a, d_b, d_lora_bias, d_m]


def _add_base_grad(dy: Tensor, dz: Tensor, p: Projection, k: _Kept, dx: Tensor | None) -> Tensor:
    """dx plus the gradient through W: dz W; under DoRA's dropout dy W + D(dz W)."""
    if k.mask is None or k.wide is None:
        dz = dz.to(k.compute)
        same = dx is not None and dx.dtype == dz.dtype
        grad = p.weight.input_grad(dz, dx if same else None)
        return grad if dx is None or same else dx + grad
    exact = torch.promote_types(
        k.wide, torch.float32
    )  # two rounded products: their sum is not rounded again yet
    second = p.weight.input_grad(dz.to(k.wide), stored=True).to(exact)
    grad = dropout_apply(second, k.mask, out=second).add_(p.weight.input_grad(dy.to(k.compute)))
    return grad if dx is None else grad.add_(dx)


@contextlib.contextmanager
def _no_autocast(x: Tensor) -> Any:
    """Autocast off inside, because every cast here is explicit; gives the dtype it would have cast x to, or
    None.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        yield None
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype
