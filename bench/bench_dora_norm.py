"""How long do DoRA's row norms take, from a dense and from an NF4 weight, on one thread and on all?

Bytes: W as stored + A + B + the norms. PEFT: its own DoraLinearLayer, which pushes an identity through the
adapter and adds the product to a copy of W; for a 4-bit weight after bitsandbytes has unpacked it.
"""

import pytest
import torch
from torch import nn

from bench._cases import (
    DTYPES,
    RANK,
    THREADS,
    WEIGHTS,
    bnb_state,
    nf4,
    noise,
    ours,
    short,
    skip_slow,
    stored_bytes,
)
from pyfastlora.ops import dora_norm


@pytest.mark.parametrize("threads", THREADS, indirect=True, ids="{}t".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("shape", WEIGHTS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dora_norm"), "PEFT"])
def test_dora_norm(measure, variant, shape, storage, dtype, threads):
    skip_slow(variant, shape)
    w = nf4(shape, dtype) if storage == "nf4" else noise(*shape, dtype=dtype)
    a, b = (
        noise(RANK, shape[1], dtype=dtype, seed=1) * 0.02,
        noise(shape[0], RANK, dtype=dtype, seed=2) * 0.02,
    )

    def call():
        dora_norm(w, a, b, 2.0)

    if variant == "PEFT":
        call = peft_norm(w, a, b)
    moved = (w.nbytes if storage == "dense" else stored_bytes(w)) + a.nbytes + b.nbytes + shape[0] * 4
    case = f"{short(shape)} {storage} r={RANK}"
    measure("dora_norm", variant, call, case=case, dtype=dtype, moved=moved)


def peft_norm(w, a, b):
    """What peft.tuners.lora.dora.DoraLinearLayer.forward does before its products."""
    from peft.tuners.lora.dora import DoraLinearLayer

    layer = DoraLinearLayer(fan_in_fan_out=False)
    lora_a, lora_b = nn.Linear(*a.t().shape, bias=False), nn.Linear(*b.t().shape, bias=False)
    lora_a.weight, lora_b.weight = nn.Parameter(a), nn.Parameter(b)
    if not isinstance(w, torch.Tensor):
        functional = pytest.importorskip("bitsandbytes.functional")
        packed, state = w.packed.view(-1, 1), bnb_state(w)

    def call():
        dense = w if isinstance(w, torch.Tensor) else functional.dequantize_4bit(packed, state)
        layer.get_weight_norm(dense, layer.get_lora_weight(lora_a, lora_b), 2.0)

    return call
