"""glu_forward and glu_backward in Triton: `act(gate) * up` and its gradients, one pass over each tensor.

    y = act(gate) * up                                              3 passes
    dgate = dy up act'(gate),  dup = dy act(gate),  product = y     6 passes

Bound by memory. One program takes BLOCK columns of one row; rows have any pitch and 64-bit offsets; the maths
is float32, rounded once. Launchers have the names and arguments of the native ops.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyfastlora.kernels_triton._tuning import config

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@triton.jit
def _sigmoid(x):
    """(s, 1 - s): the latter as exp(-x) s, as subtracting leaves no digits of it where s is nearly 1."""
    e = tl.exp(tl.minimum(-x, 88.0))  # finite: infinity times 0 is not 1
    s = 1.0 / (1.0 + e)
    return s, e * s


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """(act(x), act'(x)); ACT as in ACTS."""
    if ACT == 0:
        s, complement = _sigmoid(x)
        return x * s, s * (1.0 + x * complement)
    elif ACT == 1:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:  # 0.5 x (1 + tanh(u)) with (1 + tanh(u)) / 2 = sigmoid(2u)
        s, complement = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return x * s, s + x * s * complement * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACT == 3:
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        r = tl.where(x <= 0, 0.0, x)
        return r * r, 2.0 * r


@triton.jit
def _forward_kernel(gate, up, y, gate_pitch, up_pitch, y_pitch, cols, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * pitch reaches 2^31 at 131072 rows of 16384
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    g = tl.load(gate + row * gate_pitch + col, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_pitch + col, inside, 0.0).to(tl.float32)
    value, _ = _activate(g, ACT)
    tl.store(y + row * y_pitch + col, (value * u).to(y.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    dy,
    gate,
    up,
    dgate,
    dup,
    product,
    dy_pitch,
    gate_pitch,
    up_pitch,
    pitch,
    cols,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    d = tl.load(dy + row * dy_pitch + col, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_pitch + col, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_pitch + col, inside, 0.0).to(tl.float32)
    value, slope = _activate(g, ACT)
    at = row * pitch + col
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), inside)
    tl.store(dup + at, (d * value).to(dup.dtype.element_ty), inside)
    tl.store(product + at, (value * u).to(product.dtype.element_ty), inside)


# ---- launchers ----


def glu_forward(gate: Tensor, up: Tensor, act: str, y: Tensor) -> None:
    """y = act(gate) * up; all [T, O] with packed columns."""
    if y.numel():
        meta, _ = config("glu_forward", y)
        grid = (y.shape[0], triton.cdiv(y.shape[1], meta["BLOCK"]))
        pitches = (gate.stride(0), up.stride(0), y.stride(0))
        _forward_kernel[grid](gate, up, y, *pitches, y.shape[1], ACT=ACTS.index(act), **meta)


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, dgate: Tensor, dup: Tensor, product: Tensor
) -> None:
    """The two gradients and the product; all [T, O] with packed columns, the outputs of one pitch."""
    if dgate.numel():
        meta, _ = config("glu_backward", dgate)
        grid = (dgate.shape[0], triton.cdiv(dgate.shape[1], meta["BLOCK"]))
        pitches = (dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0))
        tensors = (dy, gate, up, dgate, dup, product)
        _backward_kernel[grid](*tensors, *pitches, dgate.shape[1], ACT=ACTS.index(act), **meta)
