"""How near is unpacking LLM.int8 rows to a memcpy?

Bytes: O I int8 values and O scales read, O I values written; memcpy copies those O I values from a ready
buffer. Ours writes into a buffer that is used again; bitsandbytes returns a fresh tensor.
"""

import pytest
import torch

from bench._cases import DEVICE, DTYPES, WEIGHTS, noise, ours, short, skip_slow
from pyfastlora.ops import Packed8bit, dequant_8bit


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", WEIGHTS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dequant_8bit"), "bitsandbytes", "memcpy"])
def test_dequant_8bit(measure, variant, shape, dtype):
    skip_slow(variant, shape)
    values = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    w = Packed8bit(values, noise(shape[0], dtype=torch.float32).abs(), dtype)
    out, ready = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)

    def memcpy():
        out.copy_(ready)

    def call():
        dequant_8bit(w, out=out)

    if variant == "bitsandbytes":
        functional = pytest.importorskip("bitsandbytes.functional")

        def call():
            functional.int8_vectorwise_dequant(w.values, w.absmax)

    elif variant == "memcpy":
        call = memcpy
    moved = 2 * out.nbytes if variant == "memcpy" else values.nbytes + w.absmax.nbytes + out.nbytes
    measure("dequant_8bit", variant, call, case=short(shape), dtype=dtype, moved=moved, memcpy=memcpy)
