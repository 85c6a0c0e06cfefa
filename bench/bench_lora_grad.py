"""What does a factor's gradient cost, the sum over all tokens of small outer products?

Bytes: x + S (float32) + the gradient (float32), with dropout the mask's bits too. torch: the mask's product
where there is one, and the GEMM in x's dtype, as autograd runs them.
"""

import pytest

from bench._cases import ACTIVATIONS, DTYPES, RANK, ROUNDED, mask_for, noise, ours, short
from pyfastlora.ops import lora_grad


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("lora_grad"), *ROUNDED, "torch"])
def test_lora_grad(measure, variant, shape, dtype, dropout):
    x = noise(*shape, dtype=dtype)
    narrow = noise(shape[0], RANK, dtype=dtype, seed=1)
    s = narrow.float()
    mask = mask_for(x) if dropout else None
    dense_mask = mask.unpack(shape[1], dtype) if mask else None

    def call():
        lora_grad(s, x, mask=mask)

    if variant in ROUNDED:

        def call():
            lora_grad(narrow, x, mask=mask)

    elif variant == "torch":

        def call():
            narrow.t() @ (x if dense_mask is None else x * dense_mask)

    moved = x.nbytes + s.nbytes + RANK * shape[1] * 4 + (mask.bits.nbytes if mask else 0)
    case = f"{short(shape)} r={RANK}" + (" dropout" if dropout else "")
    measure("lora_grad", variant, call, case=case, dtype=dtype, moved=moved)
