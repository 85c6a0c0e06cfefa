"""How near is unpacking NF4 to a memcpy, on one thread and on all?

Bytes: O I / 2 nibbles + O I / 64 scales read, O I values written; memcpy copies those O I values from a
ready buffer. Ours writes into a buffer that is used again, as the fused layers do; bitsandbytes has no
`out` on a CPU and returns a fresh tensor. Every time is that of double-quantised weights of blocksize 64.
"""

import pytest

from bench._cases import DTYPES, THREADS, WEIGHTS, bnb_state, nf4, noise, ours, short, skip_slow, stored_bytes
from pyfastlora.ops import dequant_4bit


@pytest.mark.parametrize("threads", THREADS, indirect=True, ids="{}t".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", WEIGHTS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dequant_4bit"), "bitsandbytes", "memcpy"])
def test_dequant_4bit(measure, variant, shape, dtype, threads):
    skip_slow(variant, shape)
    w = nf4(shape, dtype)
    out, ready = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)

    def memcpy():
        out.copy_(ready)

    def call():
        dequant_4bit(w, out=out)

    if variant == "bitsandbytes":
        functional = pytest.importorskip("bitsandbytes.functional")
        packed, state = w.packed.view(-1, 1), bnb_state(w)

        def call():
            functional.dequantize_4bit(packed, state)

    elif variant == "memcpy":
        call = memcpy
    moved = 2 * out.nbytes if variant == "memcpy" else stored_bytes(w) + out.nbytes
    measure("dequant_4bit", variant, call, case=short(shape), dtype=dtype, moved=moved, memcpy=memcpy)
