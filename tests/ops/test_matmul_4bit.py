"""What could break: the switch between decoding and GEMM, panels that do not divide the weight, blocks across
rows.
"""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, implementations, name_of, rows
from test_dequant_4bit import packed_weight

from pyfastlora.ops import backend, dequant_4bit, matmul_4bit


@pytest.mark.parametrize("name", implementations("matmul_4bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 13, 16, 33, 70])
@pytest.mark.parametrize("shape", [(48, 96), (33, 127), (130, 64), (300, 544), (65, 2080)], ids=str)
def test_as_close_as_a_dense_product(name, dtype, transposed, tokens, shape):
    w = packed_weight(shape)
    x = rows(tokens, shape[0 if transposed else 1], dtype, pitch=2104)
    dense = dequant_4bit(w, dtype)
    dense = dense if transposed else dense.t()
    with backend(f"matmul_4bit={name}"):
        ours = matmul_4bit(x, w, transposed=transposed)
    assert ours.dtype == dtype
    terms = x.shape[1] if dtype == torch.float32 else 0
    assert_as_exact(ours, x @ dense, x.double() @ dense.double(), terms=terms)


@pytest.mark.parametrize("name", implementations("matmul_4bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("tokens", [3, 33])
def test_added_to_what_is_there(name, dtype, transposed, tokens):
    w = packed_weight((72, 96))
    inner, outer = (72, 96) if transposed else (96, 72)
    x, y = rows(tokens, inner, dtype), rows(tokens, outer, dtype, pitch=100, seed=1)
    dense = dequant_4bit(w, dtype)
    dense = dense if transposed else dense.t()
    theirs, exact = y + x @ dense, y.double() + x.double() @ dense.double()
    with backend(f"matmul_4bit={name}"):
        assert matmul_4bit(x, w, transposed=transposed, out=y, accumulate=True) is y
    assert_as_exact(y, theirs, exact)


@pytest.mark.parametrize("name", implementations("matmul_4bit"))
def test_rows_off_the_16_byte_grid(name):
    w = packed_weight((48, 96))
    x = rows(6, 97, torch.bfloat16, pitch=101)[:, 1:]
    dense = dequant_4bit(w, x.dtype).t()
    with backend(f"matmul_4bit={name}"):
        assert_as_exact(matmul_4bit(x, w), x @ dense, x.double() @ dense.double())


def test_more_rows_than_one_pass_over_the_weight():
    """Past 2048 rows the AMX kernel starts over with the decoded weight."""
    w = packed_weight((40, 64))
    x = rows(2100, 64, torch.bfloat16)
    dense = dequant_4bit(w)
    assert_as_exact(matmul_4bit(x, w), x @ dense.t(), x.double() @ dense.double().t())


@pytest.mark.parametrize("blocksize", [32, 64, 512])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
def test_every_kind_of_block(blocksize, quant_type, nested):
    w = packed_weight((72, 96), blocksize, quant_type, nested)
    x, dy = rows(40, 96, torch.bfloat16), rows(40, 72, torch.bfloat16)
    dense = dequant_4bit(w)
    for few in (x, x[:7]):
        assert_as_exact(matmul_4bit(few, w), few @ dense.t(), few.double() @ dense.double().t())
    assert_as_exact(matmul_4bit(dy, w, transposed=True), dy @ dense, dy.double() @ dense.double())


@pytest.mark.parametrize("name", implementations("matmul_4bit"))
@pytest.mark.parametrize("blocksize", [20, 96])
@pytest.mark.parametrize("tokens", [3, 20])
def test_blocks_that_are_no_power_of_two(name, blocksize, tokens):
    w = packed_weight((40, 96), blocksize)
    x, dense = rows(tokens, 96, torch.bfloat16), dequant_4bit(w, torch.bfloat16).t()
    with backend(f"matmul_4bit={name}"):
        ours = matmul_4bit(x, w)
    assert_as_exact(ours, x @ dense, x.double() @ dense.double())


@pytest.mark.cpu_only("panels are how the CPU kernel keeps W in its cache")
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
def test_panels_cover_the_weight(monkeypatch, transposed):
    import sys

    monkeypatch.setattr(sys.modules["pyfastlora.ops._panels"], "PANEL_BYTES", 1)
    w = packed_weight((200, 136))
    x = rows(9, 200 if transposed else 136, torch.float32)
    dense = dequant_4bit(w, torch.float32)
    dense = dense if transposed else dense.t()
    ours = matmul_4bit(x, w, transposed=transposed)
    assert_as_exact(ours, x @ dense, x.double() @ dense.double())


@pytest.mark.parametrize("name", implementations("matmul_4bit"))
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_weights_are_rounded_to_another_dtype_before_they_take_that_of_x(name, tokens, transposed):
    w = packed_weight((48, 96))
    x = rows(tokens, w.shape[0 if transposed else 1], torch.float32)
    dense = dequant_4bit(w, torch.bfloat16).float()
    dense = dense if transposed else dense.t()
    with backend(f"matmul_4bit={name}"):
        ours = matmul_4bit(x, w, transposed=transposed, values=torch.bfloat16)
    assert_as_exact(ours, x @ dense, x.double() @ dense.double())


def test_float64_and_errors():
    w = packed_weight((6, 10))
    x = rows(3, 10, torch.float64)
    assert torch.equal(matmul_4bit(x, w), x @ dequant_4bit(w, torch.float64).t())
    with pytest.raises(ValueError, match=r"x must be \[..., 10\] for a weight of \[6, 10\]; got \[3, 9\]"):
        matmul_4bit(x[:, :9], w)
    with pytest.raises(ValueError, match="accumulate takes out"):
        matmul_4bit(torch.zeros(3, 10), w, accumulate=True)
