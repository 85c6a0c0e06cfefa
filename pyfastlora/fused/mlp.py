"""A gated feed-forward block as one autograd node: gate, up, GLU and down, each with or without an adapter.

    g = P_gate(x),  u = P_up(x)          h = act(g) * u          y = P_down(h)

P are the projections of `projections.py`, with their formulas for LoRA, DoRA, dropout and biases. Gate and up
are two of them or, packed, one of 2 H outputs whose halves they are. Backward, with dh the input gradient of
P_down:

    dg = dh * u * act'(g),    du = dh * act(g)          dx and the adapters' gradients from dg and du

Saved: x, g and u, and what each projection keeps but its input, which for down is h: `glu_backward` gives it
again on the way. Of DoRA without dropout the unscaled product is saved and g or u made of it again, in one
pass: both would be one [T, H] more. Not differentiable twice. Source: Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastlora.fused.modes import no_autocast, obeying, output_like
from pyfastlora.fused.projection import PER_PROJECTION, Projection, check, output_dtype
from pyfastlora.fused.projections import (
    Kept,
    Part,
    as_kept,
    inner_grads,
    input_grad,
    outer_grads,
    restore,
    run_backward,
    run_forward,
    save,
    scaled,
    to_keep,
)
from pyfastlora.ops import glu_backward, glu_forward
from pyfastlora.ops._shapes import rows_of


def fused_mlp(
    x: Tensor, inputs: Sequence[Projection], down: Projection, act: str, *, gate_first: bool = True
) -> Tensor:
    """down(act(gate(x)) * up(x)) [..., O] for x [..., I], with one node in the graph.

    inputs: gate and up, or one projection of both. `gate_first`: gate is the first of the two, in the order
    in which PEFT would call them and draw their dropout masks, or the first half. act: one of
    `pyfastlora.ops.glu.ACTS`. The dtypes are those of PEFT's layers around torch's activation. Raises
    ValueError for tensors that do not fit.
    """
    for projection in inputs:
        check("fused_mlp", "x", x.shape, projection)
    widths = [p.weight.shape[0] for p in inputs]
    hidden = widths[0] // (3 - len(widths))
    if widths not in ([hidden, hidden], [2 * hidden]):
        raise ValueError(
            f"fused_mlp: inputs must be gate and up of one width, or one projection of both; got {widths}"
        )
    check("fused_mlp", "the product", [*x.shape[:-1], hidden], down)
    projections = (*inputs, down)
    tensors = [t for projection in projections for t in projection.parameters]
    return _FusedMLP.apply(x, projections, act, gate_first, product_dtype(x, inputs, act), *tensors)


def product_dtype(x: Tensor, inputs: Sequence[Projection], act: str) -> torch.dtype:
    """The dtype of act(gate) * up, under the autocast in force."""
    dtype = output_dtype(x, inputs[0])
    for projection in inputs[1:]:
        dtype = torch.promote_types(dtype, output_dtype(x, projection))
    # A square is a power, which autocast computes in float32 on a GPU.
    squared = act == "relu2" and x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.promote_types(dtype, torch.float32) if squared else dtype


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projections: tuple[Projection, ...],
        act: str,
        gate_first: bool,
        dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> Tensor:
        *inputs, down = projections
        with no_autocast(x) as cast:
            outputs, kept = run_forward(x, inputs, cast)
            product = glu_forward(*_gate_and_up(outputs, gate_first, dtype), act)
            (y,), kept_down = run_forward(product.view(*x.shape[:-1], product.shape[1]), [down], cast)
        outs = [None if _again(p, k) else out for p, k, out in zip(inputs, kept, outputs, strict=True)]
        save(ctx, [to_keep(ctx, x, inputs), *outs], tensors, projections, kept + kept_down)
        ctx.act, ctx.gate_first, ctx.dtype = act, gate_first, dtype
        return output_like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        (x, *outputs), projections, kept = restore(ctx, len(ctx.projections))  # x, and all outputs but y
        x = as_kept(ctx, x)
        wants_x, _, _, _, _, *wanted = ctx.needs_input_grad
        (*inputs, down), (*kept_inputs, kept_down) = projections, kept
        wanted_inputs, wanted_down = wanted[:-PER_PROJECTION], wanted[-PER_PROJECTION:]
        with no_autocast(x), obeying(ctx.requests):
            part = Part(down, kept_down, rows_of(dy), wanted_down)
            wants_product = wants_x or any(wanted_inputs)
            bias, _, *others = outer_grads(part, wants_product)
            for i, (p, k) in enumerate(zip(inputs, kept_inputs, strict=True)):
                outputs[i] = scaled(p, k) if _again(p, k) else outputs[i]
            dx: Tensor | None = None
            found: list[Tensor | None] = [None] * len(wanted_inputs)
            gate, up = _gate_and_up(outputs, ctx.gate_first, ctx.dtype)
            if wants_product:
                dh = input_grad([part], gate.shape[1], ctx.dtype)
                grads, product = _glu_grads(dh, gate, up, ctx.act, ctx.gate_first, len(inputs))
                (grad_of_a,) = inner_grads([part], product)
                del dh, product, gate, up, outputs
                dx, found = run_backward(x, inputs, kept_inputs, grads, wants_x, wanted_inputs)
            else:
                (grad_of_a,) = (
                    inner_grads([part], glu_forward(gate, up, ctx.act)) if wanted_down[1] else (None,)
                )
        return (dx, None, None, None, None, *found, bias, grad_of_a, *others)


def _again(p: Projection, k: Kept) -> bool:
    """Whether the projection's output is made again from what it keeps."""
    return p.magnitude is not None and k.mask is None


def _gate_and_up(outputs: Sequence[Tensor], gate_first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both [T, H], in the product's dtype."""
    first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=1)
    gate, up = (first, second) if gate_first else (second, first)
    return gate.to(dtype), up.to(dtype)


def _glu_grads(
    dh: Tensor, gate: Tensor, up: Tensor, act: str, gate_first: bool, count: int
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the `count` input projections' outputs, and the product."""
    if count == 2:
        dgate, dup, product = glu_backward(dh, gate, up, act)
        return [dgate, dup] if gate_first else [dup, dgate], product
    tokens, hidden = dh.shape
    # Thirds of one tensor: the first two together are the gradient of the packed output.
    whole = dh.new_empty(tokens, 3 * hidden)
    first, second, product = whole.chunk(3, dim=1)
    dgate, dup = (first, second) if gate_first else (second, first)
    glu_backward(dh, gate, up, act, out=(dgate, dup, product))
    return [whole[:, : 2 * hidden]], product
