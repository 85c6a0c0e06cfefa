"""How near is applying a stored dropout mask to a copy?

Bytes: x read, the result written, one bit per element of mask. torch: the product with a mask kept in x's
dtype.
"""

import pytest

from bench._cases import ACTIVATIONS, DTYPES, mask_for, noise, ours, short
from pyfastlora.ops import dropout_apply


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dropout_apply"), "torch"])
def test_dropout_apply(measure, variant, shape, dtype):
    x = noise(*shape, dtype=dtype)
    mask = mask_for(x)
    dense_mask = mask.unpack(shape[1], dtype)

    def call():
        x * dense_mask if variant == "torch" else dropout_apply(x, mask)

    moved = 2 * x.nbytes + mask.bits.nbytes
    measure("dropout_apply", variant, call, case=short(shape), dtype=dtype, moved=moved)
