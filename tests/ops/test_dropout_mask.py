"""What could break: anything that makes the mask differ from torch's in one bit, or leaves another generator
behind.
"""

import pytest
import torch
import torch.nn.functional as F
from accuracy import FLOATS, implementations, name_of, rng_state, set_rng_state

from pyfastlora.ops import backend, dropout_apply, dropout_mask

NAMES = implementations("dropout_mask")


def torch_mask(x, p):
    return F.dropout(torch.ones_like(x), p) != 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (2, 3, 33), (4, 128), (40, 100), (70, 1040), (0, 4)], ids=str
)
def test_the_bits_torch_draws(name, dtype, p, shape):
    x = torch.randn(shape).to(dtype)
    torch.manual_seed(11)
    torch.rand(3)  # the generator in the middle of its block
    want = torch_mask(x, p)
    after = rng_state()
    torch.manual_seed(11)
    torch.rand(3)
    with backend(f"dropout_mask={name}"):
        mask = dropout_mask(x, p)
    if p > 0:  # dropout(p=0) draws nothing; ours is not called with it
        assert torch.equal(mask.unpack(shape[-1], torch.float32) != 0, want.flatten(0, -2))
        assert torch.equal(rng_state(), after)
    assert mask.scale == 1 / (1 - p)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1, 2, 623, 624, 625])
def test_any_position_of_the_generator(before, name):
    x = torch.empty(9, 211)
    torch.manual_seed(5)
    for _ in range(before):
        torch.randint(2**31, (1,))  # one 32-bit word each
    state = rng_state()
    want = torch_mask(x, 0.25)
    after = rng_state()
    set_rng_state(state)
    with backend(f"dropout_mask={name}"):
        mask = dropout_mask(x, 0.25)
    assert torch.equal(mask.unpack(211, torch.float32) != 0, want)
    assert torch.equal(rng_state(), after)


@pytest.mark.parametrize("name", NAMES)
def test_other_memory_orders_are_drawn_in_memory_order(name):
    x = torch.empty(6, 10).t()
    torch.manual_seed(2)
    want = torch_mask(x, 0.5)
    torch.manual_seed(2)
    with backend(f"dropout_mask={name}"):
        assert torch.equal(dropout_mask(x, 0.5).unpack(6, torch.float32) != 0, want)


@pytest.mark.parametrize("name", implementations("dropout_apply"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_what_torch_keeps_in_place(name, dtype):
    x = torch.randn(70, 1040).to(dtype)
    torch.manual_seed(3)
    want = F.dropout(x, 0.25)
    torch.manual_seed(3)
    mask = dropout_mask(x, 0.25)
    with backend(f"dropout_apply={name}"):
        dropout_apply(x, mask, out=x)
    assert torch.equal(x == 0, want == 0)
    torch.testing.assert_close(x, want)


def test_errors():
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            dropout_mask(torch.zeros(2, 2), p)
