"""The vendor's GEMM on a GPU: which products it gets, and that they are those of the formulas. Here on any
device, with a kernel that must not be called in the kernel's place.
"""

import sys

import pytest
import torch
from accuracy import assert_as_exact, rows

from pyfastlora.ops import _gemm, lora_backward, lora_expand, lora_grad, lora_shrink
from pyfastlora.ops._shapes import rows_of

SHRINK, GRAD, BACKWARD, EXPAND = (
    sys.modules[op.__module__] for op in (lora_shrink, lora_grad, lora_backward, lora_expand)
)
BF16, F32 = torch.bfloat16, torch.float32
X, A, B, S, DY = (
    rows(count, cols, BF16, pitch=cols + 8, seed=i)
    for i, (count, cols) in enumerate(((33, 64), (16, 64), (48, 16), (33, 16), (33, 48)))
)


def forbidden(*_):
    raise AssertionError("the kernel was called")


def called(*_):
    raise LookupError


def test_products_of_one_16_bit_dtype():
    out, offset = torch.empty(33, 48, dtype=BF16), rows(1, 48, BF16, seed=9)[0]
    x, a, b, s, dy = (t.double() for t in (X, A, B, S, DY))
    exact = 0.75 * (x @ a.t())
    assert_as_exact(SHRINK.gpu(forbidden)(X, A, False, None, 0.75, BF16), exact.to(BF16), exact)
    ds = SHRINK.gpu(forbidden)(DY, B, True, None, 0.75, BF16)
    both = BACKWARD.gpu(forbidden)(DY, B, S, 0.75, BF16)
    exact = 0.75 * (dy @ b)
    for ours in (ds, both[0]):
        assert_as_exact(ours, exact.to(BF16), exact)
    exact = dy.t() @ s
    for ours in (GRAD.gpu(forbidden)(S, DY, None, 1.0, True, BF16), both[1]):
        assert_as_exact(ours, exact.to(BF16), exact)
    for shift, exact in ((None, 0.75 * (s @ b.t())), (offset, 0.75 * (s @ b.t()) + offset.double())):
        EXPAND.gpu(forbidden)(None, S, B, False, None, 0.75, None, shift, out)
        assert_as_exact(out, exact.to(BF16), exact)


@pytest.mark.parametrize(
    "run",
    [
        lambda: SHRINK.gpu(called)(X.float(), A, False, None, 1.0, BF16),
        lambda: SHRINK.gpu(called)(X, A, False, None, 1.0, F32),
        lambda: SHRINK.gpu(called)(X, A.half(), False, None, 1.0, BF16),
        lambda: GRAD.gpu(called)(S.float(), X, None, 1.0, False, BF16),
        lambda: BACKWARD.gpu(called)(DY, B.float(), S, 1.0, BF16),
        lambda: EXPAND.gpu(called)(DY, S, B, False, None, 1.0, None, None, DY),
        lambda: EXPAND.gpu(called)(None, S, B, False, None, 1.0, DY[0], None, DY),
        lambda: EXPAND.gpu(called)(None, S, B, False, None, 1.0, None, DY[0].float(), DY),
    ],
)
def test_the_rest_is_the_kernels(run):
    with pytest.raises(LookupError):
        run()


def test_a_wide_result_of_narrow_operands_is_for_cuda_alone():
    assert _gemm.gives(BF16, X) and not _gemm.gives(torch.float64, X)
    assert _gemm.gives(F32, X) == (X.is_cuda and torch.version.hip is None)


def test_rows_are_taken_as_they_lie():
    wide = rows_of(rows(33, 64, BF16, pitch=200))
    assert wide.stride() == (200, 1)
    exact = wide.double() @ A.double().t()
    assert_as_exact(SHRINK.gpu(forbidden)(wide, A, False, None, 1.0, BF16), exact.to(BF16), exact)
