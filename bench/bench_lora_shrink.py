"""What does going down to the rank cost: plain, with dropout, with float32 factors on bfloat16 x?

Bytes: x + A + S (float32), with dropout the mask's bits too. torch: the cast to the factor's dtype, the
mask's product where there is one, and the small GEMM, as PEFT runs them.
"""

import pytest
import torch.nn.functional as F

from bench._cases import ACTIVATIONS, PAIRS, RANK, ROUNDED, mask_for, noise, ours, short
from pyfastlora.ops import lora_shrink


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(("dtype", "factor"), PAIRS, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("lora_shrink"), *ROUNDED, "torch"])
def test_lora_shrink(measure, variant, shape, dtype, factor, dropout):
    x, a = noise(*shape, dtype=dtype), noise(RANK, shape[1], dtype=factor, seed=1)
    mask = mask_for(x) if dropout else None
    dense_mask = mask.unpack(shape[1], factor) if mask else None

    def call():
        lora_shrink(x, a, mask=mask)

    if variant in ROUNDED:
        narrow = a.to(dtype)

        def call():
            lora_shrink(x, narrow, mask=mask, dtype=dtype)

    elif variant == "torch":

        def call():
            rows = x.to(factor)
            F.linear(rows if dense_mask is None else rows * dense_mask, a)

    moved = x.nbytes + a.nbytes + shape[0] * RANK * 4 + (mask.bits.nbytes if mask else 0)
    case = f"{short(shape)} r={RANK} A {short(factor)}" + (" dropout" if dropout else "")
    measure("lora_shrink", variant, call, case=case, dtype=dtype, moved=moved)
