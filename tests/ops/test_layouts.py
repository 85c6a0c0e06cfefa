"""Every op takes any leading dimensions, and reads what is not packed as if it were. What could break: rows
in another order, a copy that is written and lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DEVICE, implementations, noise
from test_dequant_4bit import packed_weight
from torch import Tensor

from pyfastlora.ops import (
    DropoutMask,
    backend,
    dora_grad,
    dora_norm,
    dropout_apply,
    glu_backward,
    glu_forward,
    lora_backward,
    lora_expand,
    lora_grad,
    lora_shrink,
    lora_shrink_many,
    matmul_4bit,
)
from pyfastlora.ops.dropout_mask import pack

LEADING, COLS, RANKS, OUTS = (2, 3, 4), 64, 5, 32
ROWS = 24


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed)


def mask() -> DropoutMask:
    return DropoutMask(pack((noise(ROWS, COLS, seed=9) > -0.5).to(DEVICE)), 1.5)


X, DY = tensor(ROWS, COLS), tensor(ROWS, COLS, seed=1)
S = tensor(ROWS, RANKS, dtype=torch.float32, seed=2)
A, B = tensor(RANKS, COLS, seed=3), tensor(COLS, RANKS, dtype=torch.float32, seed=4)
W = tensor(OUTS, COLS, seed=5)
VECTOR = tensor(COLS, dtype=torch.float32, seed=6)

# Of each op: a call with the tensors whose layout changes, and these.
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "lora_shrink": (lambda x: lora_shrink(x, A, mask=mask()), (X,)),
    "lora_shrink, float32": (lambda x: lora_shrink(x, B, transposed=True), (X.float(),)),
    "lora_shrink, two": (lambda x: lora_shrink_many(x, [A, A[:2]]), (X,)),
    "lora_expand": (lambda y, s: lora_expand(y, s, B, offset=VECTOR, out=fresh(y)), (X, S)),
    "lora_grad": (lambda s, x: lora_grad(s, x, mask=mask()), (S, X)),
    "lora_backward": (lambda dy, s: lora_backward(dy, B, s), (DY, S)),
    "dora_grad": (lambda dy, z: dora_grad(dy, z, VECTOR), (DY, X)),
    "dropout_apply": (lambda x: dropout_apply(x, mask()), (X,)),
    "glu_forward": (lambda gate, up: glu_forward(gate, up), (X, DY)),
    "glu_backward": (lambda dy, gate, up: glu_backward(dy, gate, up), (DY, X, X + 1)),
    "matmul_4bit": (lambda x: matmul_4bit(x, packed_weight((OUTS, COLS))), (X,)),
    "matmul_4bit, few": (lambda x: matmul_4bit(x, packed_weight((OUTS, COLS))), (X[:3],)),
}


def fresh(y: Tensor) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def by_every_implementation(case: str) -> list[str]:
    op = case.partition(",")[0]
    return [f"{op}={name}" for name in implementations(op)]


@pytest.mark.parametrize(
    ("case", "request_"), [(case, each) for case in CASES for each in by_every_implementation(case)]
)
def test_any_layout_gives_what_packed_rows_give(case, request_):
    run, tensors = CASES[case]
    with backend(request_):
        packed = flat(run(*tensors))
        transposed = flat(run(*(t.t().contiguous().t() for t in tensors)))
        assert all(map(torch.equal, packed, transposed))
        if len(tensors[0]) == ROWS:
            deep = flat(run(*(t.view(*LEADING, -1) for t in tensors)))
            assert [t.shape[:-1] == LEADING for t in deep] == [len(t) == ROWS for t in packed]
            assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(packed, deep, strict=True))


@pytest.mark.parametrize("name", implementations("lora_shrink"))
def test_factors_in_any_layout(name):
    with backend(f"lora_shrink={name}"):
        packed = lora_shrink(X, A)
        for other in (lora_shrink(X, A.t().contiguous().t()), lora_shrink(X, A.t(), transposed=True)):
            # Not bit for bit: a vendor's GEMM may add in another order.
            torch.testing.assert_close(other, packed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", implementations("dora_norm"))
def test_norm_in_any_layout(name):
    b = tensor(OUTS, RANKS, seed=7)
    with backend(f"dora_norm={name}"):
        ours = dora_norm(*(t.t().contiguous().t() for t in (W, A, b)), 0.5)
        assert torch.equal(ours, dora_norm(W, A, b, 0.5))


FAR = 2**31 + 8  # elements from one row to the next: past what 32 bits count


def far_apart(x: Tensor) -> Tensor:
    """Two rows of x in memory that is asked for and, but for them, never touched."""
    if DEVICE.type != "cpu":
        pytest.skip("a GPU hands out whole pages")
    rows = torch.empty(FAR + x.shape[1], dtype=x.dtype).as_strided((2, x.shape[1]), (FAR, 1))
    return rows.copy_(x[:2])


@pytest.mark.parametrize("request_", by_every_implementation("lora_shrink"))
def test_rows_are_counted_in_64_bits(request_):
    with backend(request_):
        assert torch.equal(lora_shrink(far_apart(X), A), lora_shrink(X[:2], A))


@pytest.mark.parametrize("request_", by_every_implementation("lora_expand"))
def test_written_rows_are_counted_in_64_bits(request_):
    with backend(request_):
        expected = lora_expand(X[:2].clone(), S[:2], B)
        assert torch.equal(lora_expand(far_apart(X), S[:2], B), expected)


def test_what_is_written_is_never_a_copy():
    y = X.view(*LEADING, COLS).clone()
    expected = lora_expand(X.clone(), S, B)
    assert lora_expand(y, S.view(*LEADING, RANKS), B) is y
    assert torch.equal(y.view(ROWS, COLS), expected)
    needed = r"with packed columns, or contiguous if it has other than two dimensions; got \[24, 64\]"
    with pytest.raises(ValueError, match=f"lora_expand: out must be .* {needed}"):
        lora_expand(X.t().contiguous().t(), S, B)
    with pytest.raises(ValueError, match="matmul_4bit: out must be"):
        matmul_4bit(X, packed_weight((OUTS, COLS)), out=fresh(X[:, :OUTS]).t().contiguous().t())
    with pytest.raises(ValueError, match="dropout_apply: out must be"):
        dropout_apply(X, mask(), out=fresh(X[:3]))
