"""lora_shrink, lora_expand, lora_grad, dropout_apply. What could break: ranks that fill no vector, factors in
another dtype than the activations, the mask's bit order, tails of rows and columns, writes beside the
output."""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, assert_fence_untouched, error, fenced, name_of, rows

from pyfastlora.ops import (
    DropoutMask,
    backend,
    dropout_apply,
    lora_expand,
    lora_grad,
    lora_shrink,
    lora_shrink_many,
)
from pyfastlora.ops.dropout_mask import pack

SHAPES = [(1, 1, 1), (3, 19, 2), (8, 256, 16), (13, 300, 17), (33, 70, 64), (9, 513, 130)]  # T, I, R
NAMES = ["cpu", "reference"]


def mask_of(tokens, cols, p=0.3):
    keep = torch.rand(tokens, cols, generator=torch.Generator().manual_seed(9)) >= p
    return keep, DropoutMask(pack(keep), 1 / (1 - p))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("transposed", [False, True], ids=["a", "a_transposed"])
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks"), SHAPES)
def test_shrink(name, tokens, cols, ranks, dtype, factor_dtype, transposed, masked):
    x, a = rows(tokens, cols, dtype, pitch=cols + 3), rows(ranks, cols, factor_dtype, seed=1)
    keep, mask = mask_of(tokens, cols)
    dropped = x.double() * keep * mask.scale if masked else x.double()
    with backend(f"lora_shrink={name}"):
        factor = a.t().contiguous() if transposed else a
        ours = lora_shrink(x, factor, transposed=transposed, mask=mask if masked else None, scale=0.5)
    assert ours.dtype == torch.float32
    exact = dropped @ a.double().t() * 0.5
    # torch's own error depends on the layout it is given (1e-7 or 2.5e-7): the larger one is the measure.
    wide = x.float() * keep * torch.tensor(mask.scale) if masked else x.float()
    theirs = [wide @ a.float().t() * 0.5, wide @ a.float().t().contiguous() * 0.5]
    assert_as_exact(ours, max(theirs, key=lambda z: error(z, exact)), exact)


def test_shrink_many_is_one_shrink_each():
    x = rows(7, 40, torch.bfloat16)
    factors = [
        rows(3, 40, torch.float32, seed=1),
        rows(16, 40, torch.bfloat16, seed=2),
        rows(1, 40, torch.float16),
    ]
    for ours, factor in zip(lora_shrink_many(x, factors), factors, strict=True):
        torch.testing.assert_close(ours, x.float() @ factor.float().t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature", ["plain", "mask", "gain", "offset", "gain_offset"])
@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b_transposed"])
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks"), SHAPES)
def test_expand(name, tokens, cols, ranks, dtype, factor_dtype, transposed, feature):
    y, b = rows(tokens, cols, dtype, pitch=cols + 3), rows(cols, ranks, factor_dtype, seed=1)
    s = rows(tokens, ranks, torch.float32, seed=2)
    keep, mask = mask_of(tokens, cols)
    gain = rows(1, cols, torch.float32, seed=3)[0] if "gain" in feature else None
    offset = rows(1, cols, dtype, seed=4)[0] if "offset" in feature else None

    def formula(to):
        term = s.to(to) @ b.to(to).t() * 0.25
        term = term * keep * mask.scale if feature == "mask" else term
        value = (y.to(to) + term) * (1 if gain is None else gain.to(to))
        return value if offset is None else value + offset.to(to)

    out, everything = fenced(tokens, cols, dtype)
    options = dict(
        transposed=transposed, scale=0.25, gain=gain, offset=offset, mask=mask if feature == "mask" else None
    )
    factor = b.t().contiguous() if transposed else b
    with backend(f"lora_expand={name}"):
        lora_expand(y, s, factor, out=out, **options)
        in_place = lora_expand(y.clone(), s, factor, **options)
    for written in (out, in_place):
        assert_as_exact(written, formula(torch.float32).to(dtype), formula(torch.float64))
    assert_fence_untouched(everything)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks"), SHAPES)
def test_grad(name, tokens, cols, ranks, dtype, masked):
    x, s = rows(tokens, cols, dtype, pitch=cols + 3), rows(tokens, ranks, torch.float32, seed=1)
    keep, mask = mask_of(tokens, cols)
    dropped = x.double() * keep * mask.scale if masked else x.double()
    with backend(f"lora_grad={name}"):
        ours = lora_grad(s, x, mask=mask if masked else None)
    assert_as_exact(ours, s.t() @ dropped.float(), s.double().t() @ dropped)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols"), [(1, 1), (3, 19), (5, 160), (4, 33)])
def test_dropout_apply(name, tokens, cols, dtype):
    x = rows(tokens, cols, dtype, pitch=cols + 3)
    keep, mask = mask_of(tokens, cols)
    out, everything = fenced(tokens, cols, dtype)
    with backend(f"dropout_apply={name}"):
        dropout_apply(x, mask, out=out)
    assert torch.equal(out, (x.float() * keep * torch.tensor(mask.scale)).to(dtype))
    assert_fence_untouched(everything)


def test_float64_is_the_oracle_itself():
    x, a, b = (rows(*shape, torch.float64) for shape in ((5, 12), (3, 12), (7, 3)))
    s = lora_shrink(x, a)
    assert s.dtype == torch.float64 and torch.equal(s, x @ a.t())
    y = rows(5, 7, torch.float64, seed=3)
    torch.testing.assert_close(lora_expand(y.clone(), s, b), y + s @ b.t(), rtol=1e-15, atol=1e-15)


def test_nothing_in_nothing_out():
    a = torch.randn(4, 6)
    assert lora_shrink(torch.empty(0, 6), a).shape == (0, 4)
    assert lora_expand(torch.empty(0, 6), torch.empty(0, 4), a, transposed=True).shape == (0, 6)
    assert torch.equal(lora_grad(torch.empty(0, 4), torch.empty(0, 6)), torch.zeros(4, 6))


def test_errors_say_what_did_not_fit():
    with pytest.raises(
        ValueError, match=r"lora_shrink: x must be \[T, 6\] for a factor of \[4, 6\]; got \[3, 5\]"
    ):
        lora_shrink(torch.zeros(3, 5), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"lora_expand: y must be \[T, 6\] and s \[T, 4\]"):
        lora_expand(torch.zeros(3, 6), torch.zeros(2, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="lora_grad: .* must share T"):
        lora_grad(torch.zeros(3, 4), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="does not fit x"):
        dropout_apply(torch.zeros(3, 40), mask_of(3, 30)[1])
