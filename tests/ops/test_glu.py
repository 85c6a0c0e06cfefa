"""What could break: the derivative of each activation, the tails of odd widths, extremes, row pitch."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    FLOATS,
    assert_as_exact,
    assert_fence_untouched,
    fenced,
    implementations,
    name_of,
    rows,
)

from pyfastlora.ops import backend, glu_backward, glu_forward
from pyfastlora.ops.glu import ACTS

TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
NAMES = implementations("glu_forward", "glu_backward")
# In float32 1 + tanh(x) has lost the tail at -5; the compiled kernels keep it.
COMPILED = [name for name in NAMES if name in ("gpu", "cpu")]
SHAPES = [(1, 1, 1), (3, 7, 9), (5, 64, 80), (2, 259, 259), (40, 264, 272)]


def by_autograd(dy, gate, up, act):
    """(y, dgate, dup) through torch's own activations and autograd."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = TORCH[act](gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("tokens", "cols", "pitch"), SHAPES)
def test_as_close_as_torch(name, dtype, act, tokens, cols, pitch):
    gate, up, dy = (rows(tokens, cols, dtype, pitch=pitch, seed=seed) * 2 for seed in range(3))
    theirs = by_autograd(dy, gate, up, act)
    exact = by_autograd(dy.double(), gate.double(), up.double(), act)
    with backend(name):
        y = glu_forward(gate, up, act)
        dgate, dup, product = glu_backward(dy, gate, up, act)
    assert torch.equal(y, product)
    for what, ours, other, true in zip(("y", "dgate", "dup"), (y, dgate, dup), theirs, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_exact(ours, other, true, what)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("act", ACTS)
def test_extremes(act, name):
    gate = torch.tensor(
        [[-1e4, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 1e4, 1.0, -1.0, -5.0, -9.0]]
    )
    up = torch.full_like(gate, 1.5)
    y, dgate, dup = by_autograd(torch.ones_like(gate), gate.double(), up.double(), act)
    with backend(name):
        ours = glu_forward(gate, up, act)
        ours_dgate, ours_dup, _ = glu_backward(torch.ones_like(gate), gate, up, act)
    for got, want in ((ours, y), (ours_dgate, dgate), (ours_dup, dup)):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=2e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_nan(act, name):
    gate = torch.tensor([[float("nan"), 1.0]])
    with backend(name):
        y = glu_forward(gate, torch.ones(1, 2), act)
    assert y[0, 0].isnan() and y[0, 1].isfinite()


def test_layouts_and_leading_dims():
    gate, up = torch.randn(2, 3, 10), torch.randn(2, 10, 3).transpose(1, 2)
    want = F.silu(gate) * up
    torch.testing.assert_close(glu_forward(gate, up), want)
    assert glu_forward(gate[:, :0], up[:, :0]).shape == (2, 0, 10)
    must = rf"up must be \[2, 3, 10\] float32 on {gate.device} like gate; got \[3, 10\]"
    with pytest.raises(ValueError, match=must):
        glu_forward(gate, up[0])
    with pytest.raises(ValueError, match="act must be one of silu, .*; got 'swish'"):
        glu_forward(gate, up, "swish")


@pytest.mark.parametrize("name", NAMES)
def test_backward_into_the_thirds_of_one_tensor(name):
    gate, up, dy = (rows(5, 9, torch.float32, seed=seed) for seed in range(3))
    whole, everything = fenced(5, 27, torch.float32)
    with backend(name):
        want = glu_backward(dy, gate, up, "gelu")
        got = glu_backward(dy, gate, up, "gelu", out=whole.chunk(3, dim=1))
    assert torch.equal(whole, torch.cat(want, dim=1)) and torch.equal(torch.cat(got, dim=1), whole)
    assert_fence_untouched(everything)
    with pytest.raises(ValueError, match=r"out must be \[5, 9\] with packed columns.*; got \[5, 8\]"):
        glu_backward(dy, gate, up, out=(gate, up, whole[:, :8]))
