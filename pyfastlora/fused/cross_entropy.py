"""The loss of a language model's head, as one autograd node: the logits never exist whole.

Forward, for x [T, H], labels [T] and a head that gives logits [T, V], z = cap(scale logits), where cap(v) is
c tanh(v / c) under soft-capping, else v. Of the tokens whose label l is not ignore_index, with e: label
smoothing, k: the z-loss's weight,

    lse = log sum_v exp z_v
    loss_t = (1 - e) (lse - z_l) + e (lse - mean_v z_v) + k lse^2

Gradient, made in the same pass, a chunk of tokens at a time, in the buffer that held the chunk's logits:

    dz_v = softmax(z)_v (1 + 2 k lse) - (1 - e) [v = l] - e / V
    dlogits = scale dz (1 - (z / c)^2)

and from there dx and the gradients of an adapter by the formulas of `projections`, dW = dlogits^T x added up
over the chunks. Ignored tokens are left out before the head and cost nothing.

The products are the weight's own (vendor GEMMs, panels of a quantised weight), the softmax is torch's, in
float32 (float64 for float64 logits). Logits are rounded to the head's dtype, and their gradient, as without
the node. Saved: dx [T', H] of the T' tokens that count, and the gradients of the head's parameters.
Not differentiable twice. Sources: transformers/loss/loss_utils.py; Wijmans et al. 2024 (chunks), Chowdhery et
al. 2022 (z-loss), Gemma 2 (soft-capping).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastlora.fused.modes import no_autocast
from pyfastlora.fused.projection import Projection, check
from pyfastlora.fused.projections import run_backward, run_forward
from pyfastlora.ops._shapes import rows_of
from pyfastlora.weights.dense import DenseWeight

# Tokens in a chunk: a share of all, so that what a chunk's logits take, 8 bytes each in all, is 5 % of the
# whole logits in float32. Not fewer than 64, though: a vendor's GEMM packs its weight at every call. Against
# torch's loss of whole logits, both passes, V = 32k, two cores of an EPYC, T x H = 1024 x 1024, 4096 x 512,
# 8192 x 256: 0.96, 0.78, 0.51 of the time in bfloat16; 1.50, 1.10, 0.86 in float32.
CHUNK_SHARE, LEAST_TOKENS = 1 / 40, 64


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What the loss is made of beside logits and labels; the defaults are torch's cross_entropy.

    softcap: c, or None. scale: of the logits, before the cap. z_loss: k.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    scale: float = 1.0


_PLAIN = LossOptions()


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """loss: the sum over tokens, or its quotient; by_token [...]: each one's, 0 where ignored; correct [...]:
    whether the label has the largest logit.
    """

    loss: Tensor
    by_token: Tensor
    correct: Tensor


def linear_cross_entropy(
    x: Tensor,
    labels: Tensor,
    head: Projection,
    options: LossOptions = _PLAIN,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """The cross-entropy of head(x) [..., V] against labels [...], a float32 number (float64 for float64).

    x [..., H] and labels [...] stand at the same places: whoever predicts the next token shifts before. The
    sum over tokens is divided by `divisor`; None: by the number of tokens that count, torch's "mean" (nan
    without any). A dense head whose weight requires a gradient gets it. Raises ValueError for shapes that do
    not fit, labels outside [0, V), and dropout on the head.
    """
    return token_losses(x, labels, head, options, divisor).loss


def token_losses(
    x: Tensor,
    labels: Tensor,
    head: Projection,
    options: LossOptions = _PLAIN,
    divisor: float | Tensor | None = None,
) -> TokenLosses:
    """`linear_cross_entropy` with what each token adds to it, from the same pass; those take no gradient."""
    check("linear_cross_entropy", "x", x.shape, head)
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be {list(x.shape[:-1])} for x {list(x.shape)}; "
            f"got {list(labels.shape)}"
        )
    if head.dropout > 0:
        raise ValueError("linear_cross_entropy: dropout on the head draws its mask over all tokens at once")
    flat = labels.reshape(-1)
    counted = torch.nonzero(flat != options.ignore_index).flatten()
    targets = flat[counted]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < head.weight.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: labels must be in [0, {head.weight.shape[0]}) or {options.ignore_index}; "
            f"got {int(targets.min())} to {int(targets.max())}"
        )
    weight = head.weight.weight if isinstance(head.weight, DenseWeight) else None
    by = len(targets) if divisor is None else divisor
    job = _Job(head, options, counted, targets, torch.is_grad_enabled(), by)
    loss, by_token, correct = _LinearCrossEntropy.apply(x, job, weight, *head.parameters)
    return TokenLosses(loss, by_token.view(labels.shape), correct.view(labels.shape))


@dataclass(frozen=True, slots=True)
class _Job:
    head: Projection
    options: LossOptions
    counted: Tensor  # [T'] which tokens count
    targets: Tensor  # [T'] their labels
    grads: bool
    divisor: float | Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, job: _Job, weight: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_x, _, wants_weight, *wanted = ctx.needs_input_grad if job.grads else [False] * 8
        wants_bias, *factors, wants_lora_bias, magnitude = wanted
        rows, head = rows_of(x), job.head
        exact = torch.promote_types(x.dtype, torch.float32)
        by_token = torch.zeros(rows.shape[0], dtype=exact, device=x.device)
        correct = torch.zeros(rows.shape[0], dtype=torch.bool, device=x.device)
        mantissa, ctx.power = _parts(job.divisor)
        factor = mantissa if wants_x or wants_weight or any(wanted) else None
        dx = rows.new_empty(len(job.counted), rows.shape[1]) if wants_x else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wants_weight and weight is not None else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with no_autocast(x) as cast:
            for at in _chunks(len(job.counted)):
                tokens, targets = job.counted[at], job.targets[at]
                some = rows[tokens]
                (logits,), kept = run_forward(some, [head], cast)
                by_token[tokens], correct[tokens], dz = _losses(logits, targets, job.options, factor)
                if dz is None:
                    continue
                if d_weight is not None:
                    d_weight.addmm_(dz.t(), some.to(exact))
                dlogits = dz.to(logits.dtype)
                # not the biases: rounded for each chunk they would be off by more than PEFT's
                these = (False, *factors, False, magnitude)
                grad, grads = run_backward(some, [head], kept, [dlogits], wants_x, these)
                if dx is not None and grad is not None:
                    dx[at] = grad
                total = dlogits.sum(0, dtype=exact) if wants_bias or wants_lora_bias else None
                grads[0] = total if wants_bias else None
                grads[3] = total * head.scaling if wants_lora_bias and total is not None else None
                sums = [_added(before, one, exact) for before, one in zip(sums, grads, strict=True)]
        ctx.save_for_backward(dx, d_weight, job.counted, *sums)
        ctx.x_shape = x.shape
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, *parameters)]
        ctx.mark_non_differentiable(by_token, correct)
        ctx.set_materialize_grads(False)
        return by_token.sum() / job.divisor, by_token, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        dx, d_weight, counted, *sums = ctx.saved_tensors
        if grad is None:
            return (None,) * (3 + len(sums))
        factor, whole = grad * ctx.power, None
        if dx is not None:
            whole = dx.new_zeros(math.prod(ctx.x_shape[:-1]), ctx.x_shape[-1])
            whole[counted] = (dx * factor).to(dx.dtype)
            whole = whole.view(ctx.x_shape)
        first, *found = [
            None if total is None else (total * factor).to(dtype)
            for total, dtype in zip((d_weight, *sums), ctx.dtypes, strict=True)
        ]
        return whole, None, first, *found


def _parts(divisor: float | Tensor) -> tuple[Any, Any]:
    """1 / divisor as a number in [0.5, 1), which gradients are multiplied by before they are rounded, and a
    power of two, by which they are afterwards: one rounding, and nothing is lost in float16's small numbers.
    """
    if isinstance(divisor, Tensor):
        share, exponent = torch.frexp(1 / divisor.float())
        return share, torch.ldexp(torch.ones_like(share), exponent)
    mantissa, power = math.frexp(1 / divisor if divisor else 1.0)
    return mantissa, 2.0**power


def _chunks(tokens: int) -> Iterator[slice]:
    """Slices of the tokens, of nearly one length."""
    count = math.ceil(tokens / max(LEAST_TOKENS, int(tokens * CHUNK_SHARE)))
    bounds = [tokens * i // count for i in range(count + 1)] if count else []
    return (slice(a, b) for a, b in itertools.pairwise(bounds))


def _losses(
    logits: Tensor, targets: Tensor, o: LossOptions, factor: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses [n] and hits [n] of logits [n, V]; with a factor, dlogits times it, not yet rounded."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if o.scale != 1:
        z *= o.scale
    if o.softcap is not None:
        z.div_(o.softcap).tanh_().mul_(o.softcap)
    slope = 1 - (z / o.softcap) ** 2 if o.softcap is not None and factor is not None else None
    at = targets[:, None]
    own, mean = z.gather(1, at).flatten(), z.mean(1) if o.label_smoothing else None
    highest, first = z.max(1, keepdim=True)
    sums = z.sub_(highest).exp_().sum(1, keepdim=True)
    lse = (highest + sums.log()).flatten()
    losses = lse - own
    if mean is not None:
        losses = (1 - o.label_smoothing) * losses + o.label_smoothing * (lse - mean)
    if o.z_loss:
        losses = losses + o.z_loss * lse**2
    hits = first.flatten() == targets
    if factor is None:
        return losses, hits, None
    dz = z.mul_((1 + 2 * o.z_loss * lse)[:, None] / sums)
    dz.scatter_add_(1, at, torch.full_like(own, o.label_smoothing - 1)[:, None])
    if o.label_smoothing:
        dz -= o.label_smoothing / z.shape[1]
    if slope is not None:
        dz *= slope
    return losses, hits, dz.mul_(factor * o.scale)


def _added(total: Tensor | None, grad: Tensor | None, exact: torch.dtype) -> Tensor | None:
    if grad is None:
        return total
    return grad.to(exact) if total is None else total.add_(grad)
