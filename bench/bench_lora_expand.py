"""What does adding the adapter's share to the base output cost?

Bytes: y read and written + S (float32) + B; of a 16-bit S y is written only, before its base is added. PEFT:
`y + F.linear(S, B) * scale`, with the casts where B is wider than y; torch: one `addmm_` where the dtypes
agree, the best a caller of torch can do.
"""

import pytest
import torch
import torch.nn.functional as F

from bench._cases import ACTIVATIONS, PAIRS, RANK, ROUNDED, noise, ours, short
from pyfastlora.ops import lora_expand


@pytest.mark.parametrize(("dtype", "factor"), PAIRS, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("lora_expand"), *ROUNDED, "PEFT", "torch"])
def test_lora_expand(measure, variant, shape, dtype, factor):
    if variant == "torch" and dtype != factor:
        pytest.skip("addmm_ takes one dtype")
    y, s = noise(*shape, dtype=dtype), noise(shape[0], RANK, dtype=torch.float32, seed=1)
    b = noise(shape[1], RANK, dtype=factor, seed=2)
    narrow = s.to(factor)

    def call():
        lora_expand(y, s, b, scale=1e-4)

    if variant in ROUNDED:
        s16, b16 = s.to(dtype), b.to(dtype)

        def call():
            lora_expand(None, s16, b16, scale=1e-4, out=y)

    elif variant == "PEFT":

        def call():
            (y + F.linear(narrow, b) * 1e-4).to(dtype)

    elif variant == "torch":

        def call():
            y.addmm_(narrow, b.t(), alpha=1e-4)

    moved = 2 * y.nbytes + s.nbytes + b.nbytes
    case = f"{short(shape)} r={RANK} B {short(factor)}"
    measure("lora_expand", variant, call, case=case, dtype=dtype, moved=moved)
