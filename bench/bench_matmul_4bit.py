"""What does a product with a 4-bit weight cost beside the dense one, for one token and for many, and for dx?

Bytes: x + packed W + y. From a few dozen tokens on it is bound by arithmetic and the share of a copy's
bandwidth says little; `dense` is the floor then: the same product with W already unpacked. `copy` unpacks W
whole first: where it overtakes ours is where FEW_ROWS_GPU belongs (pyfastlora/ops/matmul_4bit.py).
"""

import pytest
import torch
import torch.nn.functional as F

from bench._cases import DTYPES, WEIGHTS, bnb_state, nf4, noise, ours, short, skip_slow, stored_bytes
from pyfastlora.ops import dequant_4bit, matmul_4bit

TOKENS = (1, 4, 8, 16, 32, 64, 128, 512)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", WEIGHTS, ids=short)
@pytest.mark.parametrize(("product", "tokens"), [*(("y", tokens) for tokens in TOKENS), ("dx", 512)])
@pytest.mark.parametrize("variant", [*ours("matmul_4bit"), "copy", "bitsandbytes", "dense"])
def test_matmul_4bit(measure, variant, product, tokens, shape, dtype):
    skip_slow(variant, shape)
    w = nf4(shape, dtype)
    transposed = product == "dx"
    x = noise(tokens, shape[0 if transposed else 1], dtype=dtype)

    def call():
        matmul_4bit(x, w, transposed=transposed)

    if variant == "dense":
        dense = dequant_4bit(w, dtype)

        def call():
            x @ dense if transposed else F.linear(x, dense)

    elif variant == "copy":
        dense = dequant_4bit(w, dtype)

        def call():
            dequant_4bit(w, out=dense)
            x @ dense if transposed else F.linear(x, dense)

    elif variant == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes")
        packed, state = w.packed.view(-1, 1), bnb_state(w)

        def call():
            if transposed:  # MatMul4Bit.backward
                torch.matmul(x, bnb.functional.dequantize_4bit(packed, state).to(x.dtype))
            else:
                bnb.matmul_4bit(x, packed, state)

    moved = x.nbytes + stored_bytes(w) + tokens * shape[1 if transposed else 0] * dtype.itemsize
    case = f"{short(shape)} {product} T={tokens}"
    measure("matmul_4bit", variant, call, case=case, dtype=dtype, moved=moved)
