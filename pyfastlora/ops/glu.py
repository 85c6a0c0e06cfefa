"""glu_forward and glu_backward: the gated activation of a feed-forward block, in one pass each.

    y = act(gate) * up
    dgate = dy * up * act'(gate),   dup = dy * act(gate),   product = act(gate) * up

act: silu, gelu (exact, through erf), gelu_tanh, relu, relu2 (relu squared). The maths is float32 whatever the
tensors' dtype, rounded once per output. Sources: Shazeer 2020 (GLU variants), So et al. 2021 (squared ReLU).

The rank-r products of what is read and written here (S of down, dS and dB of gate and up, dA of down) are
passes of their own, though four reads of [T, O] could be spared by making them from registers: 236 us by
count of bytes, for 8192 x 14336 in bfloat16 on an H200, r = 16. There the vendor's GEMMs make them in 392 us
as measured (69 + 2 x 128 + 67), our own kernels in 662 (163 + 2 x 174 + 151), bound by what they compute and
not by what they read: inside these kernels, which run at 96 % of a copy, that work would stay. No such kernel
was built, so its gain is counted and not measured; on a CPU not even that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import check_same, rows_of, written_rows
from pyfastlora.ops._triton import triton_implementation

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def glu_forward(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up.

    gate, up [..., O], one shape and float dtype; rows of any pitch are read in place when the tensor is 2-D,
    other layouts are copied. Returns a new, packed tensor. Raises ValueError for shapes that differ or an
    unknown act.
    """
    check_same("glu_forward", gate=gate, up=up)
    _check_act("glu_forward", act)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    FORWARD.pick(gate)(rows_of(gate), rows_of(up), act, rows_of(y))
    return y


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str = "silu", *, out: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, product) for `y = act(gate) * up`; the product is computed again because nobody kept it.

    dy, gate, up [..., O] as in `glu_forward`. Returns three new, packed tensors, or `out`: three like
    gate, with packed columns and one row pitch. Raises ValueError as `glu_forward` does.
    """
    check_same("glu_backward", gate=gate, up=up, dy=dy)
    _check_act("glu_backward", act)
    if out is None:
        out = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(3)]
    written = [written_rows("glu_backward", each, gate.shape) for each in out]
    BACKWARD.pick(gate)(rows_of(dy), rows_of(gate), rows_of(up), act, *written)
    return out[0], out[1], out[2]


def _check_act(op: str, act: str) -> None:
    if act not in ACTS:
        raise ValueError(f"{op}: act must be one of {', '.join(ACTS)}; got {act!r}")


def activate(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(act(x), act'(x)) in x's dtype: the definition the kernels are held to."""
    if act == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
    if act == "gelu_tanh":
        k = (2 / torch.pi) ** 0.5
        tanh = torch.tanh(k * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * k * (
            1 + 3 * 0.044715 * x**2
        )
    positive = F.relu(x)
    return (positive, (x > 0).to(x.dtype)) if act == "relu" else (positive**2, 2 * positive)


def reference_forward(gate: Tensor, up: Tensor, act: str, y: Tensor) -> None:
    wide = torch.promote_types(gate.dtype, torch.float32)
    y.copy_(activate(gate.to(wide), act)[0] * up.to(wide))


def reference_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, dgate: Tensor, dup: Tensor, product: Tensor
) -> None:
    wide = torch.promote_types(gate.dtype, torch.float32)
    (value, slope), wide_up, wide_dy = activate(gate.to(wide), act), up.to(wide), dy.to(wide)
    dgate.copy_(wide_dy * wide_up * slope)
    dup.copy_(wide_dy * value)
    product.copy_(value * wide_up)


def native_forward(gate: Tensor, up: Tensor, act: str, y: Tensor) -> None:
    torch.ops.pyfastlora.glu_forward.default(gate, up, ACTS.index(act), y)


def native_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, dgate: Tensor, dup: Tensor, product: Tensor
) -> None:
    torch.ops.pyfastlora.glu_backward.default(dy, gate, up, ACTS.index(act), dgate, dup, product)


FORWARD = Op(
    "glu_forward",
    Implementation("gpu", native_forward, why_not_gpu),
    triton_implementation("glu", "glu_forward"),
    Implementation("cpu", native_forward, why_not_cpu),
    Implementation("reference", reference_forward, always),
)
BACKWARD = Op(
    "glu_backward",
    Implementation("gpu", native_backward, why_not_gpu),
    triton_implementation("glu", "glu_backward"),
    Implementation("cpu", native_backward, why_not_cpu),
    Implementation("reference", reference_backward, always),
)
