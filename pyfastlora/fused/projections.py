"""Adapted linears that share one input, as one autograd node.

Forward, for each projection i of x [T, I] (D: dropout, s: scaling, S = s D(x) A^T, g = m / ||W + s B A||, m:
DoRA's magnitude):

    LoRA             y = x W^T + S B^T + (b + s b_B)
    DoRA             y = g (x W^T + S B^T) + b
    DoRA, dropout    y = x W^T + (g - 1) D(x) W^T + g S B^T + b

Backward, with G = dy^T S, u the base product that g multiplies (x W^T, or D(x) W^T under dropout), dS the
gradient of D(x) A^T, and the norm a constant as in PEFT:

    dB = g G        dS = s dy (g B)        dA = dS^T D(x)        db = sum dy        db_B = s sum dy
    dm = (sum_t dy u + <B, G>) / norm      dx = (g dy) W + D(dS A), summed over the projections

Every sum is float32 (float64 for float64 inputs). On a CPU so are S and dS; on a GPU they are rounded to
bfloat16 where PEFT rounds them, for the vendor's GEMMs (ops/_gemm.py), and to float16 nowhere: s x A^T may
leave its range where x A^T does not. What remains is rounded once where it meets an output: at least as exact
as PEFT's. Saved: x itself (shared with the caller), S [T, r], the dropout
mask as bits (1/16 of a bfloat16 x), for DoRA u [T, O]. Not differentiable twice. Sources: Hu et al. 2021, Liu
et al. 2024, and for each rounding and cast peft/tuners/lora/{layer,bnb,dora,variants}.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastlora.fused import extension
from pyfastlora.fused.modes import no_autocast, obeying, output_like
from pyfastlora.fused.projection import PER_PROJECTION, Projection, base_dtype, check, dropped_dtype
from pyfastlora.ops import (
    DropoutMask,
    dora_grad,
    dropout_apply,
    dropout_mask,
    lora_backward,
    lora_expand,
    lora_grad,
    lora_grad_many,
    lora_shrink,
    lora_shrink_many,
)
from pyfastlora.ops._registry import requests_in_force
from pyfastlora.ops._shapes import as_dtype, rows_of, stack


def fused_projections(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """The outputs [..., O_i] of `projections` for x [..., I], with one node in the graph.

    The output's dtype is the base layer's: autocast's where it is on, else the weight's (4-bit: x's). Dropout
    masks are drawn in the order of `projections` from torch's default generator. Raises ValueError for
    tensors that do not fit.
    """
    for projection in projections:
        check("fused_projections", "x", x.shape, projection)
    tensors = [t for projection in projections for t in projection.parameters]
    return list(_FusedProjections.apply(x, tuple(projections), *tensors))


# Where S and dS are rounded as PEFT rounds them, and where in that case the adapter's part, which PEFT rounds
# then, too, is written first and the base product added to it (beta = 1): 26 us and a read of which a third
# shows, for the 50 us of adding it in place; T = 8192, 4096 wide, bfloat16, H200. On a CPU oneDNN's beta = 1
# costs what our pass does: 2.01 ms against 1.98, T = 512, 2048 x 2048, bfloat16, Xeon.
ROUND_AS_PEFT = {"cuda"}


@dataclass(slots=True)
class Kept:
    """What one projection keeps from forward to backward. Tensors leave it for `save_for_backward`."""

    compute: torch.dtype  # the base product's
    gradient: torch.dtype  # of dx's product
    adapter: torch.dtype  # of S and dS
    wide: torch.dtype | None = None  # DoRA with dropout: of the second base product
    a: Tensor | None = None  # A as it is multiplied: cast, where S is rounded
    b: Tensor | None = None  # B
    s: Tensor | None = None  # S [T, r]
    mask: DropoutMask | None = None
    base: Tensor | None = None  # u [T, O]
    norm: Tensor | None = None  # [O]

    @property
    def rounded(self) -> bool:
        """Whether S and dS are, as PEFT's."""
        return self.adapter == torch.bfloat16


class _FusedProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        with no_autocast(x) as cast:
            outputs, kept = run_forward(x, projections, cast)
        save(ctx, [to_keep(ctx, x, projections)], tensors, projections, kept)
        return tuple(output_like(x, y) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        (x,), projections, kept = restore(ctx, 1)
        x = as_kept(ctx, x)
        wants_x, _, *wanted = ctx.needs_input_grad
        with no_autocast(x), obeying(ctx.requests):
            dx, found = run_backward(x, projections, kept, grads, wants_x, wanted)
        if not torch.compiler.is_compiling():  # patching/groups.py asks whether it can be run back again
            ctx.run_back = not torch._C._autograd._get_current_graph_task_keep_graph()
        return (dx, None, *found)


# ---- from forward to backward
# ----------------------------------------------------------------------------------------


def to_keep(ctx: Any, x: Tensor, projections: Sequence[Projection]) -> Tensor | None:
    """x, if the gradient of an A will want it: without, a caller may write to it, as after PEFT's forward."""
    ctx.x_shape, ctx.x_dtype, ctx.x_device = x.shape, x.dtype, x.device
    return x if any(p.lora_A is not None and p.lora_A.requires_grad for p in projections) else None


def as_kept(ctx: Any, x: Tensor | None) -> Tensor:
    """x, or what has its shape, dtype and device and no values."""
    return torch.empty((), dtype=ctx.x_dtype, device=ctx.x_device).expand(ctx.x_shape) if x is None else x


def save(
    ctx: Any,
    others: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    projections: tuple[Projection, ...],
    kept: Sequence[Kept],
) -> None:
    """Give the node what `restore` takes out again; `tensors` are the projections' parameters."""
    saved = [*others, *tensors]
    for p, k in zip(projections, kept, strict=True):
        a, b = (None if cast is given else cast for cast, given in ((k.a, p.lora_A), (k.b, p.lora_B)))
        saved += [a, b, k.s, k.mask.bits if k.mask else None, k.base, k.norm, *p.weight.tensors]
    ctx.save_for_backward(*saved)
    ctx.projections = projections
    ctx.plan = [(k.compute, k.gradient, k.adapter, k.wide, k.mask.scale if k.mask else 1.0) for k in kept]
    ctx.requests = requests_in_force()
    ctx.set_materialize_grads(False)


def restore(ctx: Any, others: int) -> tuple[list[Any], list[Projection], list[Kept]]:
    """The `others` first tensors, the projections around the tensors that came back, and what they kept."""
    saved = list(ctx.saved_tensors)
    count = others + PER_PROJECTION * len(ctx.projections)
    first, tensors, rest = saved[:others], saved[others:count], saved[count:]
    projections, kept = [], []
    for i, (p, (compute, gradient, adapter, wide, scale)) in enumerate(
        zip(ctx.projections, ctx.plan, strict=True)
    ):
        bias, a, b, lora_bias, magnitude = tensors[PER_PROJECTION * i : PER_PROJECTION * (i + 1)]
        (cast_a, cast_b, s, bits, base, norm), rest = rest[:6], rest[6:]
        held, rest = rest[: len(p.weight.tensors)], rest[len(p.weight.tensors) :]
        weight = p.weight.rebuild(tuple(held))
        projections.append(Projection(weight, bias, a, b, lora_bias, p.scaling, p.dropout, magnitude))
        mask = None if bits is None else DropoutMask(bits, scale)
        cast_a, cast_b = a if cast_a is None else cast_a, b if cast_b is None else cast_b
        kept.append(Kept(compute, gradient, adapter, wide, cast_a, cast_b, s, mask, base, norm))
    return first, projections, kept


# ---- forward
# --------------------------------------------------------------------------------------------------------


def run_forward(
    x: Tensor, projections: Sequence[Projection], cast: torch.dtype | None
) -> tuple[list[Tensor], list[Kept]]:
    """The outputs [T, O_i], and what their backward needs. `cast`: autocast's dtype, which is off by now."""
    rows = rows_of(x)
    kept = [_plan(x, p, cast) for p in projections]
    for p, k in zip(projections, kept, strict=True):
        if p.lora_A is not None and p.dropout > 0:
            k.mask = dropout_mask(x, p.dropout, dropped_dtype(x.dtype, x.device.type, p, cast))
    _shrink(rows, projections, kept)
    return [
        _forward(rows, p, k, base_dtype(x, p, k.compute, cast))
        for p, k in zip(projections, kept, strict=True)
    ], kept


def _plan(x: Tensor, p: Projection, cast: torch.dtype | None) -> Kept:
    """The dtypes, and the factors in theirs."""
    compute = p.weight.compute_dtype(x, cast)
    k = Kept(compute, p.weight.gradient_dtype(x, compute), torch.promote_types(x.dtype, torch.float32))
    if p.lora_A is None or p.lora_B is None:
        return k
    k.a, k.b, narrow = p.lora_A, p.lora_B, cast or p.lora_A.dtype
    if x.device.type in ROUND_AS_PEFT and narrow == torch.bfloat16:
        k.a, k.b, k.adapter = as_dtype(p.lora_A, narrow), as_dtype(p.lora_B, narrow), narrow
    return k


def _shrink(rows: Tensor, projections: Sequence[Projection], kept: list[Kept]) -> None:
    """Fill `s` of every adapted projection; those without a mask share one pass over x."""
    shared: dict[tuple[torch.dtype, float], list[tuple[Kept, Tensor, float]]] = {}
    for p, k in zip(projections, kept, strict=True):
        if k.a is None:
            continue
        if k.mask is None:
            # Of what is rounded, only powers of two can be multiplied in afterwards.
            mantissa = math.frexp(p.scaling)[0] if k.rounded else 1.0
            shared.setdefault((k.adapter, mantissa), []).append((k, k.a, p.scaling))
        else:
            k.s = lora_shrink(rows, k.a, mask=k.mask, scale=p.scaling, dtype=k.adapter)
    for (dtype, mantissa), those in shared.items():
        members, factors, scalings = zip(*those, strict=True)
        scale = scalings[0] if all(each == scalings[0] for each in scalings) else mantissa
        found = lora_shrink_many(rows, factors, scale=scale, dtype=dtype)
        for k, s, scaling in zip(members, found, scalings, strict=True):
            k.s = s if scaling == scale else s.mul_(scaling / scale)


def _forward(rows: Tensor, p: Projection, k: Kept, dtype: torch.dtype) -> Tensor:
    """y [T, O] in `dtype`; fills `base`, `norm` and `wide`."""
    given = as_dtype(rows, k.compute)
    if (y := _forward_extended(given, p, k)) is not None:
        return as_dtype(y, dtype)
    first = k.rounded and k.adapter == k.compute == dtype and p.magnitude is None
    if first and k.b is not None and k.s is not None:
        y = given.new_empty(given.shape[0], k.b.shape[0])
        lora_expand(None, k.s, k.b, offset=_offset(p), out=y)
        return p.weight.linear(given, onto=y)
    y = as_dtype(p.weight.linear(given), dtype)
    if p.lora_A is None or p.lora_B is None or k.b is None or k.s is None:
        return y if p.bias is None else y.add_(p.bias)
    if p.magnitude is None:
        return lora_expand(y, k.s, k.b, offset=_offset(p))
    k.norm = p.weight.norm(p.lora_A, p.lora_B, p.scaling)
    if k.mask is None:
        k.base = y  # kept without the adapter's part: <B, G> gives that exactly, and y has one rounding less
        return scaled(p, k)
    gain = p.magnitude.to(k.norm.dtype) / k.norm
    # PEFT's second product runs in the dtype of its dropped-out copy of x: the adapter's, unless autocast is
    # on.
    k.wide = (
        k.compute
        if k.compute != p.weight.compute_dtype(rows)
        else torch.promote_types(rows.dtype, p.lora_A.dtype)
    )
    dropped = dropout_apply(rows.to(torch.promote_types(rows.dtype, k.wide)), k.mask).to(k.wide)
    k.base = p.weight.linear(dropped, stored=True)
    total = torch.addcmul(y.to(k.norm.dtype), k.base.to(k.norm.dtype), gain - 1)
    return lora_expand(total, k.s, p.lora_B * gain[:, None], offset=p.bias).to(y.dtype)


def scaled(p: Projection, k: Kept) -> Tensor:
    """y [T, O] of DoRA without dropout, out of what it keeps."""
    assert k.b is not None and p.magnitude is not None
    assert k.base is not None and k.s is not None and k.norm is not None
    gain, out = p.magnitude.to(k.norm.dtype) / k.norm, torch.empty_like(k.base)
    return lora_expand(k.base, k.s, k.b, gain=gain, offset=p.bias, out=out)


def _forward_extended(rows: Tensor, p: Projection, k: Kept) -> Tensor | None:
    """y with the adapter inside the base GEMM, where the formula allows and the bytes speak for it."""
    if k.s is None or k.b is None or not (p.magnitude is p.bias is p.lora_bias is None):
        return None
    if not extension.pays(rows, k.b.shape[0], k.s, k.b) or not p.weight.has_room(rows):
        return None
    return extension.linear(p.weight.copy_with_room(rows, gradient=False), rows, k.s, k.b)


def _offset(p: Projection) -> Tensor | None:
    """b + s b_B, in float32 or wider if there are both: what is added after the adapter."""
    if p.lora_bias is None:
        return p.bias
    wide = torch.promote_types(p.lora_bias.dtype, torch.float32)
    added = p.lora_bias.to(wide) * p.scaling
    return added if p.bias is None else added + p.bias.to(wide)


# ---- backward
# -------------------------------------------------------------------------------------------------------


def run_backward(
    x: Tensor,
    projections: Sequence[Projection],
    kept: Sequence[Kept],
    grads: Sequence[Tensor | None],
    wants_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of the projections' parameters: those that are wanted."""
    out: list[Tensor | None] = []
    parts: list[Part] = []
    places: list[int] = []  # of the gradients of their A
    for i, (p, k, grad) in enumerate(zip(projections, kept, grads, strict=True)):
        if grad is None:
            out += [None] * PER_PROJECTION
            continue
        part = Part(p, k, rows_of(grad), wanted[PER_PROJECTION * i : PER_PROJECTION * (i + 1)])
        out += outer_grads(part, wants_x)
        parts.append(part)
        places.append(PER_PROJECTION * i + 1)
    for place, grad in zip(places, inner_grads(parts, x), strict=True):
        out[place] = grad
    dx = input_grad(parts, x.shape[-1], x.dtype).view(x.shape) if wants_x and parts else None
    return dx, out


@dataclass(slots=True)
class Part:
    """One projection on its way back; `outer_grads` fills in what dA and dx need too."""

    p: Projection
    k: Kept
    dy: Tensor
    wanted: Sequence[bool]  # which gradients, in the order of `Projection.parameters`
    dz: Tensor | None = None  # DoRA: g dy, of the product that g multiplies
    ds: Tensor | None = None  # dS


def outer_grads(part: Part, wants_dx: bool) -> list[Tensor | None]:
    """The gradients of bias, A, B, b_B and m, without A's: they need dy and nothing of the input."""
    wants_bias, wants_a, wants_b, wants_lora_bias, wants_m = part.wanted
    p, k, dy = part.p, part.k, part.dy
    gain = None if p.magnitude is None or k.norm is None else p.magnitude.to(k.norm.dtype) / k.norm
    d_b = d_m = d_bias = d_lora_bias = dgain = None
    if gain is not None and k.base is not None:
        factor = gain if k.mask is None else gain - 1
        part.dz, dgain = dora_grad(dy.to(k.base.dtype), k.base, factor)
    if k.s is not None and p.lora_B is not None and k.b is not None:
        factor_b = k.b if gain is None else (p.lora_B * gain[:, None]).to(k.b.dtype)
        dtype = p.lora_B.dtype if gain is None else torch.promote_types(p.lora_B.dtype, gain.dtype)
        g = None  # G [O, r]
        if (wants_a or wants_dx) and (wants_b or wants_m):
            part.ds, g = lora_backward(dy, factor_b, k.s, scale=p.scaling, dtype=dtype)
        elif wants_a or wants_dx:
            part.ds = lora_shrink(dy, factor_b, transposed=True, scale=p.scaling, dtype=k.adapter)
        elif wants_b or wants_m:
            g = lora_grad(k.s, dy, transposed=True, dtype=dtype)
        if wants_b and g is not None:
            d_b = g if gain is None else (g * gain[:, None]).to(p.lora_B.dtype)
        if wants_m and g is not None and p.magnitude is not None and dgain is not None and k.norm is not None:
            d_m = ((dgain + (k.b.to(g.dtype) * g).sum(1)) / k.norm).to(p.magnitude.dtype)
    if wants_bias or wants_lora_bias:
        total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if wants_bias and p.bias is not None:
            d_bias = total.to(p.bias.dtype)
        if wants_lora_bias and p.lora_bias is not None:
            d_lora_bias = (total * p.scaling).to(p.lora_bias.dtype)
    return [d_bias, None, d_b, d_lora_bias, d_m]


def inner_grads(parts: Sequence[Part], x: Tensor) -> list[Tensor | None]:
    """The gradients of A, where they are wanted; those without a mask share one pass over x."""
    out: list[Tensor | None] = [None] * len(parts)
    wanted = [
        (i, part.ds, part.p.lora_A.dtype, part.k.mask)
        for i, part in enumerate(parts)
        if part.wanted[1] and part.ds is not None and part.p.lora_A is not None
    ]
    if not wanted:
        return out
    rows = rows_of(x)
    for i, ds, dtype, mask in wanted:
        if mask is not None:
            out[i] = lora_grad(ds, rows, mask=mask, dtype=dtype)
    if plain := [(i, ds, dtype) for i, ds, dtype, mask in wanted if mask is None]:
        places, factors, dtypes = zip(*plain, strict=True)
        for i, grad in zip(places, lora_grad_many(factors, rows, dtypes), strict=True):
            out[i] = grad
    return out


def input_grad(parts: Sequence[Part], columns: int, dtype: torch.dtype) -> Tensor:
    """dx [T, I] in x's dtype: the sum over the projections of (g dy) W + D(dS A).

    The adapters' terms come first, small as they are, and the base products are added to them (beta = 1):
    of three siblings in bfloat16 that rounds 6 units of a base product's last place in all, base products
    first 17, PEFT 14. A single one has no sum: there the faster order.
    """
    first = len(parts) > 1 or (parts[0].k.rounded and parts[0].k.mask is None)
    first &= all(part.k.gradient == dtype and part.k.wide is None for part in parts)
    extended = [_extends(part) for part in parts]
    terms = [part for part, by_gemm in zip(parts, extended, strict=True) if not by_gemm]
    dx = _add_terms(None, terms, columns, dtype) if first else None
    for part, by_gemm in zip(parts, extended, strict=True):
        dx = _add_extended(part, dx) if by_gemm else _add_base_grad(part, dx)
    assert dx is not None
    if first:
        return dx
    dx = as_dtype(dx, torch.promote_types(dx.dtype, dtype))  # the wider one until everything is in
    _add_terms(dx, terms, columns, dtype)
    return as_dtype(dx, dtype)


def _add_terms(dx: Tensor | None, parts: Sequence[Part], columns: int, dtype: torch.dtype) -> Tensor | None:
    """dx plus the D(dS A), in place; a new one of `dtype` without dx. Those without a mask share one pass."""
    terms = [(part.ds, part.k.a, part.k.mask) for part in parts]
    adapted = [(ds, a, mask) for ds, a, mask in terms if ds is not None and a is not None]
    passes = [term for term in adapted if term[2] is not None]
    if plain := [(ds, a) for ds, a, mask in adapted if mask is None]:
        many, factors = zip(*plain, strict=True)
        passes.append((many[0] if len(many) == 1 else torch.cat(many, dim=1), stack(factors), None))
    for ds, a, mask in passes:
        out = ds.new_empty(ds.shape[0], columns, dtype=dtype) if dx is None else dx
        dx = lora_expand(dx, ds, a, transposed=True, mask=mask, out=out)
    return dx


def _extends(part: Part) -> bool:
    """Whether base and adapter are added to dx by one GEMM, as in `_forward_extended`."""
    p, k, ds = part.p, part.k, part.ds
    if ds is None or k.a is None or k.mask is not None or p.magnitude is not None:
        return False
    if not p.weight.has_room(part.dy):  # before dy is cast for nothing
        return False
    return extension.pays(as_dtype(part.dy, k.gradient), k.a.shape[1], ds, k.a)


def _add_extended(part: Part, dx: Tensor | None) -> Tensor:
    assert part.ds is not None and part.k.a is not None
    rows = as_dtype(part.dy, part.k.gradient)
    copy = part.p.weight.copy_with_room(rows, gradient=True)
    same = dx is not None and dx.dtype == rows.dtype
    grad = extension.input_grad(copy, rows, part.ds, part.k.a, dx if same else None)
    return grad if dx is None or same else dx + grad


def _add_base_grad(part: Part, dx: Tensor | None) -> Tensor:
    """dx plus the gradient through W: (g dy) W; under DoRA's dropout dy W + D(((g - 1) dy) W)."""
    p, k, dy, dz = part.p, part.k, part.dy, part.dy if part.dz is None else part.dz
    if k.mask is None or k.wide is None:
        dz = as_dtype(dz, k.gradient)
        same = dx is not None and dx.dtype == dz.dtype
        grad = p.weight.input_grad(dz, dx if same else None)
        return grad if dx is None or same else dx + grad
    # Two rounded products: their sum is not rounded again yet.
    exact = torch.promote_types(k.wide, torch.float32)
    second = p.weight.input_grad(dz.to(k.wide), stored=True).to(exact)
    grad = dropout_apply(second, k.mask, out=second).add_(p.weight.input_grad(dy.to(k.gradient)))
    return grad if dx is None else grad.add_(dx)
