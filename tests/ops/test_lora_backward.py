"""lora_backward: dS and dB in one pass. What could break: strips of columns that share dS, ranges of rows
that share dB, ranks beyond one tile, and rows on and off the 16-byte grid.
"""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, implementations, name_of, rows

from pyfastlora.ops import backend, lora_backward, lora_shrink

DTYPES = [(dtype, factor, factor) for dtype in FLOATS for factor in FLOATS]
DTYPES += [(torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float32)]
# T, O, R and dy's pitch
SHAPES = [(1, 5, 2, 8), (3, 19, 2, 22), (70, 513, 17, 520), (40, 1100, 33, 1104), (150, 1024, 16, 1032)]


@pytest.mark.parametrize("name", implementations("lora_backward"))
@pytest.mark.parametrize(("dtype", "factor_dtype", "out_dtype"), DTYPES, ids=name_of)
@pytest.mark.parametrize(("tokens", "cols", "ranks", "pitch"), SHAPES)
def test_both_gradients(name, tokens, cols, ranks, pitch, dtype, factor_dtype, out_dtype):
    dy, b = rows(tokens, cols, dtype, pitch=pitch), rows(cols, ranks, factor_dtype, pitch=ranks + 3, seed=1)
    s = rows(tokens, ranks, torch.float32, pitch=ranks + 1, seed=2)
    with backend(f"lora_backward={name}"):
        ds, db = lora_backward(dy, b, s, scale=0.75, dtype=out_dtype)
    assert ds.dtype == torch.float32 and db.dtype == out_dtype and ds.is_contiguous() and db.is_contiguous()
    assert_as_exact(ds, 0.75 * (dy.float() @ b.float()), 0.75 * (dy.double() @ b.double()), "dS", terms=cols)
    plain = (dy.float().t() @ s).to(out_dtype)
    assert_as_exact(db, plain, dy.double().t() @ s.double(), "dB")


@pytest.mark.parametrize("name", implementations("lora_backward"))
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_ds_has_the_dtype_of_s(name, out_dtype):
    dy, b, s = (
        rows(*shape, torch.bfloat16, pitch=80, seed=i) for i, shape in enumerate(((33, 70), (70, 5), (33, 5)))
    )
    with backend(f"lora_backward={name}"):
        ds, db = lora_backward(dy, b, s, scale=0.75, dtype=out_dtype)
    for ours, exact, dtype in (
        (ds, 0.75 * (dy.double() @ b.double()), torch.bfloat16),
        (db, dy.double().t() @ s.double(), out_dtype),
    ):
        assert ours.dtype == dtype
        assert_as_exact(ours, exact.to(dtype), exact)


@pytest.mark.parametrize("name", implementations("lora_backward"))
def test_nothing_in_zeros_out(name):
    with backend(f"lora_backward={name}"):
        ds, db = lora_backward(torch.empty(0, 6), torch.randn(6, 4), torch.empty(0, 4))
    assert ds.shape == (0, 4) and torch.equal(db, torch.zeros(6, 4))


@pytest.mark.parametrize("name", implementations("lora_backward"))
def test_no_columns_give_zeros(name):
    dy, b = torch.empty(33, 0, dtype=torch.bfloat16), torch.empty(0, 4, dtype=torch.bfloat16)
    with backend(f"lora_backward={name}"):
        ds, db = lora_backward(dy, b, torch.randn(33, 4))
    assert torch.equal(ds, torch.zeros(33, 4)) and db.shape == (0, 4)
    a = torch.empty(4, 0, dtype=torch.bfloat16)
    assert torch.equal(lora_shrink(dy, a), torch.zeros(33, 4))


def test_float64_is_the_oracle_itself():
    dy, b, s = (rows(*shape, torch.float64) for shape in ((5, 12), (12, 3), (5, 3)))
    ds, db = lora_backward(dy, b, s)
    assert torch.equal(ds, dy @ b) and torch.equal(db, dy.t() @ s)


def test_errors_say_what_did_not_fit():
    message = r"lora_backward: .* must fit; got \[3, 6\], \[6, 4\] and \[3, 5\]"
    with pytest.raises(ValueError, match=message):
        lora_backward(torch.zeros(3, 6), torch.zeros(6, 4), torch.zeros(3, 5))
