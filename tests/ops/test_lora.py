"""lora_shrink, lora_expand, lora_grad, dropout_apply. What could break: ranks that fill no vector, factors in
another dtype than the activations, the mask's bit order, tails of rows and columns, writes beside the
output."""

import pytest
import torch
from accuracy import (
    DEVICE,
    FLOATS,
    assert_as_exact,
    assert_fence_untouched,
    error,
    fenced,
    implementations,
    name_of,
    rows,
)

from pyfastlora.ops import (
    DropoutMask,
    backend,
    dropout_apply,
    lora_expand,
    lora_grad,
    lora_grad_many,
    lora_shrink,
    lora_shrink_many,
)
from pyfastlora.ops.dropout_mask import pack

SHAPES = [(1, 1, 1), (3, 19, 2), (8, 256, 16), (13, 300, 17), (33, 70, 64), (9, 513, 130)]  # T, I, R


def mask_of(tokens, cols, p=0.3):
    drawn = torch.rand(tokens, cols, generator=torch.Generator().manual_seed(9), device="cpu")
    keep = (drawn >= p).to(DEVICE)
    return keep, DropoutMask(pack(keep), 1 / (1 - p))


@pytest.mark.parametrize("name", implementations("lora_shrink"))
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


@pytest.mark.parametrize("wide", [False, True])
def test_shrink_many_is_one_shrink_each(wide):
    x = rows(7, 40, torch.bfloat16)
    factors = [rows(16, 40, torch.bfloat16, seed=2), rows(1, 40, torch.float16)]
    if wide:
        factors.append(rows(3, 40, torch.float32, seed=1))
    for ours, factor in zip(lora_shrink_many(x, factors), factors, strict=True):
        exact = x.double() @ factor.double().t()
        assert_as_exact(ours, x.float() @ factor.float().t(), exact)


@pytest.mark.parametrize("mixed", [False, True])
def test_grad_many_is_one_grad_each(mixed):
    x = rows(7, 40, torch.bfloat16)
    factors = [
        rows(7, 16, torch.float32, seed=2),
        rows(7, 1, torch.float32),
        rows(7, 3, torch.float32, seed=1),
    ]
    dtypes = [torch.float32, torch.bfloat16 if mixed else torch.float32, torch.float32]
    grads = lora_grad_many(factors, x, dtypes)
    assert [grad.dtype for grad in grads] == dtypes
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 3
    for ours, s, dtype in zip(grads, factors, dtypes, strict=True):
        exact = s.double().t() @ x.double()
        assert_as_exact(ours, (s.t() @ x.float()).to(dtype), exact)


@pytest.mark.parametrize("name", implementations("lora_expand"))
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
    offset = rows(1, cols, dtype, seed=5)[0] if "offset" in feature else None

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
    with backend(f"lora_expand={name}"):
        lora_expand(None, s, factor, out=out, **options)
    y = torch.zeros_like(y)
    assert_as_exact(out, formula(torch.float32).to(dtype), formula(torch.float64), terms=ranks)
    assert_fence_untouched(everything)


@pytest.mark.parametrize("name", implementations("lora_shrink", "lora_expand", "lora_grad"))
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_s_rounded_to_16_bits(name, dtype, masked):
    """Of S and dS in x's dtype, which a GPU leaves to the vendor's GEMM."""
    x, a, b = rows(33, 70, dtype, pitch=72), rows(5, 70, dtype, seed=1), rows(40, 5, dtype, seed=2)
    keep, mask = mask_of(33, 70)
    dropped, mask = (x.double() * keep * mask.scale, mask) if masked else (x.double(), None)
    ds, offset = rows(33, 5, dtype, pitch=8, seed=3), rows(1, 40, dtype, seed=4)[0]
    with backend(",".join(f"{op}={name}" for op in ("lora_shrink", "lora_expand", "lora_grad"))):
        s = lora_shrink(x, a, mask=mask, scale=0.75, dtype=dtype)
        up, shifted = (torch.empty(33, 40, dtype=dtype) for _ in range(2))
        lora_expand(None, ds, b, scale=0.75, out=up)
        lora_expand(None, ds, b, offset=offset, out=shifted)
        grads = [lora_grad(ds, x, mask=mask, scale=0.75, dtype=to) for to in (dtype, torch.float32)]
        grads.append(lora_grad(ds, x, mask=mask, scale=0.75, transposed=True, dtype=dtype).t())
    assert s.dtype == dtype and grads[1].dtype == torch.float32
    product, shrunk = ds.double() @ b.double().t(), 0.75 * (dropped @ a.double().t())
    grad = 0.75 * (ds.double().t() @ dropped)
    for ours, exact in (
        (s, shrunk),
        (up, 0.75 * product),
        (shifted, product + offset),
        *((g, grad) for g in grads),
    ):
        assert_as_exact(ours, exact.to(ours.dtype), exact)


@pytest.mark.parametrize("name", implementations("lora_grad"))
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("transposed", [False, True], ids=["a", "b"])
@pytest.mark.parametrize("factor_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks"), SHAPES)
def test_grad(name, tokens, cols, ranks, dtype, factor_dtype, transposed, masked):
    x, s = rows(tokens, cols, dtype, pitch=cols + 3), rows(tokens, ranks, torch.float32, seed=1)
    keep, mask = mask_of(tokens, cols)
    dropped = x.double() * keep * mask.scale if masked else x.double()
    with backend(f"lora_grad={name}"):
        ours = lora_grad(
            s, x, mask=mask if masked else None, scale=0.3, transposed=transposed, dtype=factor_dtype
        )
    exact, plain = 0.3 * (s.double().t() @ dropped), 0.3 * (s.t() @ dropped.float())
    if transposed:
        exact, plain = exact.t(), plain.t()
    assert ours.dtype == factor_dtype and ours.is_contiguous()
    assert_as_exact(ours, plain.to(factor_dtype), exact)


# Rows that start on 16 bytes: whole and cut chunks, several blocks of rows and strips of columns.
ALIGNED = [(150, 328, 20, 328), (40, 1100, 5, 1104)]  # T, I, R and the pitch


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks", "pitch"), ALIGNED)
class TestRowsOn16Bytes:
    @pytest.mark.parametrize("name", implementations("lora_shrink"))
    def test_shrink(self, name, tokens, cols, ranks, pitch, dtype, masked):
        x, a = rows(tokens, cols, dtype, pitch=pitch), rows(ranks, cols, torch.float32, pitch=pitch, seed=1)
        keep, mask = mask_of(tokens, cols)
        wide = x.double() * keep * mask.scale if masked else x.double()
        with backend(f"lora_shrink={name}"):
            ours = lora_shrink(x, a, mask=mask if masked else None)
        assert_as_exact(ours, wide.float() @ a.t(), wide @ a.double().t())

    @pytest.mark.parametrize("name", implementations("lora_expand"))
    def test_expand(self, name, tokens, cols, ranks, pitch, dtype, masked):
        y, b = rows(tokens, cols, dtype, pitch=pitch), rows(ranks, cols, torch.float32, pitch=pitch, seed=1)
        s, (keep, mask) = rows(tokens, ranks, torch.float32, seed=2), mask_of(tokens, cols)

        def formula(to):
            term = s.to(to) @ b.to(to)
            return y.to(to) + (term * keep * mask.scale if masked else term)

        exact, plain = formula(torch.float64), formula(torch.float32).to(dtype)
        with backend(f"lora_expand={name}"):
            lora_expand(y, s, b, transposed=True, mask=mask if masked else None)
        assert_as_exact(y, plain, exact)

    @pytest.mark.parametrize("name", implementations("lora_grad"))
    def test_grad(self, name, tokens, cols, ranks, pitch, dtype, masked):
        x, s = rows(tokens, cols, dtype, pitch=pitch), rows(tokens, ranks, torch.float32, seed=1)
        keep, mask = mask_of(tokens, cols)
        wide = x.double() * keep * mask.scale if masked else x.double()
        with backend(f"lora_grad={name}"):
            ours = lora_grad(s, x, mask=mask if masked else None)
        assert_as_exact(ours, s.t() @ wide.float(), s.double().t() @ wide)


@pytest.mark.parametrize("name", implementations("lora_shrink"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_long_sums(name, dtype):
    """Tensor cores cut their sums where float32 rounds, which shows over 4096 products."""
    x, a = rows(4, 4096, dtype), rows(3, 4096, torch.float32, seed=1)
    s, tall = rows(4096, 2, torch.float32, seed=2), rows(4096, 24, dtype, seed=3)
    with backend(f"lora_shrink={name},lora_grad={name}"):
        assert_as_exact(lora_shrink(x, a), x.float() @ a.t(), x.double() @ a.double().t(), "shrink")
        assert_as_exact(lora_grad(s, tall), s.t() @ tall.float(), s.double().t() @ tall.double(), "grad")


@pytest.mark.parametrize("name", implementations("dropout_apply"))
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
    assert torch.equal(lora_grad(s, y, transposed=True), y.t() @ s)
    assert lora_grad(s.float(), y.float(), dtype=torch.float64).dtype == torch.float64
    torch.testing.assert_close(lora_expand(y.clone(), s, b), y + s @ b.t(), rtol=1e-15, atol=1e-15)


def test_nothing_in_nothing_out():
    a = torch.randn(4, 6)
    assert lora_shrink(torch.empty(0, 6), a).shape == (0, 4)
    assert lora_expand(torch.empty(0, 6), torch.empty(0, 4), a, transposed=True).shape == (0, 6)
    assert torch.equal(lora_grad(torch.empty(0, 4), torch.empty(0, 6)), torch.zeros(4, 6))


def test_errors_say_what_did_not_fit():
    with pytest.raises(
        ValueError, match=r"lora_shrink: x .* must fit the factor \[R, I\]; got \[3, 5\] and \[4, 6\]"
    ):
        lora_shrink(torch.zeros(3, 5), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"lora_expand: y must be \[..., 6\] and s \[..., 4\]"):
        lora_expand(torch.zeros(3, 6), torch.zeros(2, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="lora_expand: without y it takes out"):
        lora_expand(None, torch.zeros(2, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="lora_grad: .* must have the same rows"):
        lora_grad(torch.zeros(3, 4), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="does not fit x"):
        dropout_apply(torch.zeros(3, 40), mask_of(3, 30)[1])
