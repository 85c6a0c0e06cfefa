"""dora_norm and dora_grad. What could break: the adapter's sign and scale, padding of odd ranks, tiles that
end early, layouts that need another kernel, a zero norm, sums.
"""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, implementations, name_of, rows
from test_dequant_4bit import packed_weight

from pyfastlora.ops import backend, dequant_4bit, dora_grad, dora_norm

SHAPES = [  # O, I, R, the pitch of W
    *[(1, 1, 1, 3), (5, 33, 3, 35), (64, 300, 16, 302), (37, 129, 65, 131), (16, 64, 512, 66)],
    *[(130, 72, 4, 72), (37, 136, 65, 144), (5, 2112, 4, 2112)],  # rows on 16 bytes
]


def norms(w, a, b, scale):
    """As PEFT computes them: B A added to a copy of W."""
    return torch.linalg.norm(w + scale * (b @ a), dim=1)


@pytest.mark.parametrize("name", implementations("dora_norm"))
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("outer", "inner", "ranks", "pitch"), SHAPES)
def test_dense(name, outer, inner, ranks, pitch, dtype, factor_dtype):
    w = rows(outer, inner, dtype, pitch=pitch)
    a, b = rows(ranks, inner, factor_dtype, seed=1) * 0.1, rows(outer, ranks, factor_dtype, seed=2) * 0.5
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, a, b, 0.7)
    theirs = norms(w.float(), a.float(), b.float(), 0.7)
    assert_as_exact(ours, theirs, norms(w.double(), a.double(), b.double(), 0.7))


@pytest.mark.parametrize("name", implementations("dora_norm"))
def test_ranks_that_no_block_holds_at_once(name):
    w = rows(5, 2112, torch.bfloat16)
    a, b = rows(50, 2112, torch.float32, seed=1) * 0.1, rows(5, 50, torch.float32, seed=2) * 0.5
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, a, b, 0.7)
    assert_as_exact(ours, norms(w.float(), a, b, 0.7), norms(w.double(), a.double(), b.double(), 0.7))


@pytest.mark.parametrize("name", implementations("dora_norm"))
@pytest.mark.parametrize("ranks", [5, 65])
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [(48, 96), (33, 127), (5, 2112)], ids=str)
def test_straight_from_4_bits(name, shape, dtype, factor_dtype, ranks):
    w = packed_weight(shape, dtype=dtype)
    a, b = rows(ranks, shape[1], factor_dtype, seed=1) * 0.1, rows(shape[0], ranks, factor_dtype, seed=2)
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, a, b, 2.0)
    dense = dequant_4bit(w)
    theirs = norms(dense.float(), a.float(), b.float(), 2.0)
    assert_as_exact(ours, theirs, norms(dense.double(), a.double(), b.double(), 2.0), terms=ranks)


@pytest.mark.parametrize("name", implementations("dora_norm"))
def test_a_row_of_zeros_has_norm_zero(name):
    w = torch.randn(4, 9)
    w[2] = 0
    b = torch.randn(4, 3)
    b[2] = 0
    with backend(f"dora_norm={name}"):
        ours = dora_norm(w, torch.randn(3, 9), b, 1.0)
    assert ours[2] == 0 and (ours[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("name", implementations("dora_grad"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    ("tokens", "cols", "pad"), [(1, 1, 1), (7, 19, 1), (33, 200, 1), (0, 5, 1), (130, 264, 8)]
)
def test_grad(name, tokens, cols, pad, dtype):
    dy, z = (
        rows(tokens, cols, dtype, pitch=cols + 3 * pad),
        rows(tokens, cols, dtype, pitch=cols + pad, seed=1),
    )
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
