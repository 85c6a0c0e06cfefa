"""What could break: the switch between decoding and GEMM, panels that do not divide the weight, blocks across
rows.
"""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, name_of, rows
from test_dequant_4bit import packed_weight

from pyfastlora.ops import backend, dequant_4bit, matmul_4bit


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 33, 70])
@pytest.mark.parametrize("shape", [(48, 96), (33, 127), (130, 64), (300, 544), (65, 2080)], ids=str)
def test_as_close_as_a_dense_product(dtype, transposed, tokens, shape):
    w = packed_weight(shape)
    x = rows(tokens, shape[0 if transposed else 1], dtype, pitch=2100)
    dense = dequant_4bit(w, dtype)
    dense = dense if transposed else dense.t()
    with backend("cpu"):
        ours = matmul_4bit(x, w, transposed=transposed)
    assert ours.dtype == dtype
    assert_as_exact(ours, x @ dense, x.double() @ dense.double())


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
    assert_as_exact(matmul_4bit(x, w), x @ dense.t(), x.double() @ dense.double().t())
    assert_as_exact(matmul_4bit(dy, w, transposed=True), dy @ dense, dy.double() @ dense.double())


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input_grad"])
def test_panels_cover_the_weight(monkeypatch, transposed):
    import sys

    monkeypatch.setattr(
        sys.modules["pyfastlora.ops.matmul_4bit"], "PANEL_BYTES", 1
    )  # 64 rows or columns a panel
    w = packed_weight((200, 136))
    x = rows(9, 200 if transposed else 136, torch.float32)
    dense = dequant_4bit(w, torch.float32)
    dense = dense if transposed else dense.t()
    ours = matmul_4bit(x, w, transposed=transposed)
    assert_as_exact(ours, x @ dense, x.double() @ dense.double())


def test_float64_and_errors():
    w = packed_weight((6, 10))
    x = rows(3, 10, torch.float64)
    assert torch.equal(matmul_4bit(x, w), x @ dequant_4bit(w, torch.float64).t())
    with pytest.raises(ValueError, match=r"x must be \[T, 10\] for a weight of \[6, 10\]; got \[3, 9\]"):
        matmul_4bit(x[:, :9], w)
