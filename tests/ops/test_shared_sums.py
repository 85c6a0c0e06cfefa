"""Sums that programs of a GPU share. What could break: a part left out or added twice, a changing order."""

import pytest
import torch
from accuracy import FLOATS, assert_as_exact, implementations, name_of, rows
from test_lora import mask_of

from pyfastlora.ops import backend, dora_grad, lora_grad, lora_shrink


@pytest.mark.parametrize("name", implementations("lora_grad"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_rank_r_products(name, dtype):
    x, a = rows(9, 900, dtype, pitch=908), rows(70, 900, torch.float32, seed=1)
    dy, s = rows(300, 100, dtype, pitch=104, seed=2), rows(300, 70, torch.float32, seed=3)
    x_keep, x_mask = mask_of(9, 900)
    keep, mask = mask_of(300, 100)
    with backend(name):
        down, grad = lora_shrink(x, a, mask=x_mask), lora_grad(s, dy, mask=mask, transposed=True)
        again = lora_shrink(x, a, mask=x_mask), lora_grad(s, dy, mask=mask, transposed=True)
    assert torch.equal(down, again[0]) and torch.equal(grad, again[1])

    def formulas(to):
        dropped = x.to(to) * x_keep * torch.tensor(x_mask.scale, dtype=to)
        return dropped @ a.to(to).t(), (dy.to(to) * keep * torch.tensor(mask.scale, dtype=to)).t() @ s.to(to)

    for ours, theirs, exact in zip(
        (down, grad), formulas(torch.float32), formulas(torch.double), strict=True
    ):
        assert_as_exact(ours, theirs, exact)


@pytest.mark.parametrize("name", implementations("dora_grad"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_dora_grad(name, dtype):
    dy, z = rows(300, 20, dtype, pitch=24), rows(300, 20, dtype, seed=1)
    with backend(name):
        (_, dgain), (_, again) = (dora_grad(dy, z, torch.ones(20)) for _ in range(2))
    assert torch.equal(dgain, again)
    assert_as_exact(dgain, (dy.float() * z.float()).sum(0), (dy.double() * z.double()).sum(0))
