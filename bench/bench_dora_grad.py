"""How near is the magnitude's part of DoRA's backward pass to a copy?

Bytes: 3 T O values (dy and z read, dz written) + gain and dgain (float32).
torch: `dy * gain` and `(dy * z).sum(0)`.
"""

import pytest
import torch

from bench._cases import ACTIVATIONS, DTYPES, noise, ours, short
from pyfastlora.ops import dora_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dora_grad"), "torch"])
def test_dora_grad(measure, variant, shape, dtype):
    dy, z = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)
    gain = noise(shape[1], dtype=torch.float32, seed=2)
    narrow = gain.to(dtype)

    def call():
        (dy * narrow, (dy * z).sum(0)) if variant == "torch" else dora_grad(dy, z, gain)

    moved = 3 * dy.nbytes + 2 * gain.nbytes
    measure("dora_grad", variant, call, case=short(shape), dtype=dtype, moved=moved)
