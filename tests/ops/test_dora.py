"""dora_norm and dora_grad. What could break: the three terms' signs and scale, padding of odd ranks, a zero
norm, sums.
"""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, name_of, rows
from test_dequant_4bit import packed_weight

from pyfastlora.ops import backend, dequant_4bit, dora_grad, dora_norm

NAMES = ["cpu", "reference"]
SHAPES = [(1, 1, 1), (5, 33, 3), (64, 300, 16), (37, 129, 65), (16, 64, 512)]  # O, I, R


def norms(w, a, b, scale):
    """As PEFT computes them: B A added to a copy of W."""
    return torch.linalg.norm(w + scale * (b @ a), dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("outer", "inner", "ranks"), SHAPES)
def test_dense(name, outer, inner, ranks, dtype, factor_dtype):
    w = rows(outer, inner, dtype, pitch=inner + 2)
    a, b = rows(ranks, inner, factor_dtype, seed=1) * 0.1, rows(outer, ranks, factor_dtype, seed=2) * 0.5
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, a, b, 0.7)
    theirs = norms(w.float(), a.float(), b.float(), 0.7)
    assert_as_exact(ours, theirs, norms(w.double(), a.double(), b.double(), 0.7))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [(48, 96), (33, 127)], ids=str)
def test_straight_from_4_bits(name, shape, dtype):
    w = packed_weight(shape, dtype=dtype)
    a, b = rows(5, shape[1], torch.float32, seed=1) * 0.1, rows(shape[0], 5, torch.float32, seed=2)
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, a, b, 2.0)
    dense = dequant_4bit(w)
    assert_as_exact(ours, norms(dense.float(), a, b, 2.0), norms(dense.double(), a.double(), b.double(), 2.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_zeros_has_norm_zero(name):
    w = torch.randn(4, 9)
    w[2] = 0
    b = torch.randn(4, 3)
    b[2] = 0
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, torch.randn(3, 9), b, 1.0)
    assert ours[2] == 0 and (ours[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols"), [(1, 1), (7, 19), (33, 200), (0, 5)])
def test_grad(name, tokens, cols, dtype):
    dy, z = rows(tokens, cols, dtype, pitch=cols + 3), rows(tokens, cols, dtype, pitch=cols + 1, seed=1)
    gain = rows(1, cols, torch.float32, seed=2)[0]
    with backend(f"dora_grad={name}"):
        dz, dgain = dora_grad(dy, z, gain)
    assert torch.equal(dz, (dy.float() * gain).to(dtype))
    if tokens:
        exact = (dy.double() * z.double()).sum(0)
        assert_as_exact(dgain, (dy.float() * z.float()).sum(0), exact)
    else:
        assert torch.equal(dgain, torch.zeros(cols))


def test_errors_say_what_did_not_fit():
    with pytest.raises(ValueError, match=r"must fit the weight \[4, 6\]; got \[2, 5\] and \[4, 2\]"):
        dora_norm(torch.zeros(4, 6), torch.zeros(2, 5), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"dy must be \[3, 4\]"):
        dora_grad(torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4))
