"""An adapted embedding as one autograd node.

Forward, for indices i [T] into W [V, D], with A [r, V], B [D, r], s: scaling, g = m / n, m [D]: DoRA's
magnitude, n_d = ||W_:d + s (B A)_d:|| over the vocabulary:

    LoRA    y = W[i] + s A^T[i] B^T
    DoRA    y = g (W[i] + s A^T[i] B^T)

Backward, with S = s A^T[i] [T, r], G = dy^T S [D, r], dS the gradient of A^T[i], and the norm a constant as
in PEFT:

    dS = s dy (g B)       dA_:v = sum of dS_t where i_t = v       dB = g G
    dm = (sum_t dy W[i] + <B, G>) / n

dA leaves the column of padding_idx zero and, with scale_grad_by_freq, divides a column by how often its index
came. The rank-r products and every sum are float32 (float64 for float64 inputs), rounded once where they meet
an output. Saved: the indices, S [T, r] float32 and n [D]; DoRA's backward gathers W[i] again. Not
differentiable twice. Sources: Hu et al. 2021, Liu et al. 2024, peft/tuners/lora/{layer,variants,dora}.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfastlora.fused.modes import no_autocast, obeying
from pyfastlora.ops import dora_grad, lora_backward, lora_expand, lora_grad, lora_shrink
from pyfastlora.ops._registry import requests_in_force
from pyfastlora.ops._shapes import rows_of
from pyfastlora.weights.dense import DenseWeight


@dataclass(frozen=True, slots=True)
class AdaptedEmbedding:
    """A frozen embedding W [V, D] and what PEFT adds to it: lora_A [r, V], lora_B [D, r], `magnitude` [D]."""

    weight: Tensor
    lora_A: Tensor  # noqa: N815  (PEFT's names)
    lora_B: Tensor  # noqa: N815
    scaling: float = 1.0
    magnitude: Tensor | None = None
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False


def fused_embedding(indices: Tensor, embedding: AdaptedEmbedding) -> Tensor:
    """The rows [..., D] for indices [...], in the weight's dtype, with one node in the graph.

    indices: int32 or int64 in [0, V). Raises ValueError for factors that do not fit the weight.
    """
    e = embedding
    _check(e)
    result: Tensor = _FusedEmbedding.apply(indices, e, e.lora_A, e.lora_B, e.magnitude)
    return result


def _check(e: AdaptedEmbedding) -> None:
    (entries, width), ranks = e.weight.shape, e.lora_A.shape[0]
    if tuple(e.lora_A.shape) != (ranks, entries) or tuple(e.lora_B.shape) != (width, ranks):
        raise ValueError(
            f"fused_embedding: lora_A [r, V] and lora_B [D, r] must fit W {[entries, width]}; "
            f"got {list(e.lora_A.shape)} and {list(e.lora_B.shape)}"
        )


class _FusedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        e: AdaptedEmbedding,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
    ) -> Tensor:
        flat = indices.reshape(-1)
        with no_autocast(e.weight):
            y = F.embedding(flat, e.weight)
            wide = torch.promote_types(y.dtype, torch.float32)
            s = F.embedding(flat, lora_a.t()).to(wide) * e.scaling
            norm = gain = None
            if magnitude is not None:
                norm = DenseWeight(e.weight, transposed=True).norm(lora_a, lora_b, e.scaling)
                gain = magnitude.to(norm.dtype) / norm
            lora_expand(y, s, lora_b, gain=gain)
        # the weight for DoRA alone, and itself: a gathered parameter is gone by the time of the backward
        ctx.save_for_backward(
            indices, s, lora_a, lora_b, magnitude, norm, None if magnitude is None else e.weight
        )
        ctx.embedding = e
        ctx.requests = requests_in_force()
        # no view: autograd lets nobody write into one that a Function made, and some models write embeddings
        return torch.ops.aten._unsafe_view(y, [*indices.shape, y.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        e: AdaptedEmbedding = ctx.embedding
        indices, s, lora_a, lora_b, magnitude, norm, weight = ctx.saved_tensors
        _, _, wants_a, wants_b, wants_m = ctx.needs_input_grad
        dy, flat = rows_of(grad), indices.reshape(-1)
        d_a = d_b = d_m = None
        with no_autocast(grad), obeying(ctx.requests):
            gain = None if magnitude is None else magnitude.to(norm.dtype) / norm
            factor = lora_b if gain is None else lora_b * gain[:, None]
            ds = g = None  # dS [T, r], G [D, r]
            if wants_a and (wants_b or wants_m):
                ds, g = lora_backward(dy, factor, s, scale=e.scaling)
            elif wants_a:
                ds = lora_shrink(dy, factor, transposed=True, scale=e.scaling)
            elif wants_b or wants_m:
                g = lora_grad(s, dy, transposed=True, dtype=factor.dtype)
            if ds is not None:
                d_a = _scatter(ds, flat, lora_a, e)
            if wants_b and g is not None:
                d_b = g if gain is None else (g * gain[:, None]).to(lora_b.dtype)
            if wants_m and g is not None and gain is not None:
                _, total = dora_grad(dy, F.embedding(flat, weight), gain)
                d_m = ((total + (lora_b.to(g.dtype) * g).sum(1)) / norm).to(magnitude.dtype)
        return None, None, d_a, d_b, d_m


def _scatter(ds: Tensor, indices: Tensor, lora_a: Tensor, e: AdaptedEmbedding) -> Tensor:
    """dA [r, V] in lora_a's dtype and layout: each token's dS, summed where its index points."""
    padding = -1 if e.padding_idx is None else e.padding_idx
    rows = torch.ops.aten.embedding_dense_backward(
        ds, indices, lora_a.shape[1], padding, e.scale_grad_by_freq
    )
    return torch.empty_like(lora_a).copy_(rows.t())
