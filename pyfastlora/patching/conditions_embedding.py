"""L5, L6, L8 and L15 of an adapted embedding, whose factors are parameters of its own.

L1 to L4, L9 to L14 are those of every layer. PEFT applies no dropout to an embedding: L7 has nothing to see.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant

from pyfastlora.patching import conditions
from pyfastlora.patching.conditions import FLOATS, Call, Condition, _dtype, _type


def l5_variant(call: Call) -> str | None:
    """The adapter is plain LoRA, or DoRA without norm caching."""
    variant = call.layer.__dict__["lora_variant"].get(call.adapter)
    if variant is None:
        return None
    if type(variant) is not DoraEmbeddingVariant:
        return f"{_type(variant)} is left to PEFT: fused are plain LoRA and DoRA"
    if type(call.magnitude) is not DoraEmbeddingLayer:
        return f"the magnitude is held by a {_type(call.magnitude)}, not by a DoraEmbeddingLayer"
    if dora.ENABLE_DORA_CACHING and not call.magnitude.training:
        return "DoraCaching is on: leave it to recompute the norm"
    if call.magnitude.__dict__["_dora_cache"]:
        return "DoraCaching kept a norm: PEFT's forward drops it"
    return None


def l6_plain_modules(call: Call) -> str | None:
    """The base layer is exactly `nn.Embedding`, without max_norm, sparse gradients or a scale."""
    assert call.base is not None
    base = call.base.__dict__
    if type(call.base) not in call.kind.bases:
        return f"the base layer is a {_type(call.base)}, not {call.kind.bases[0].__name__}"
    if base["max_norm"] is not None:
        return f"max_norm={base['max_norm']}: looking rows up rewrites the weight and lora_embedding_A"
    if base["sparse"]:
        return "sparse=True: PEFT's gradient of lora_embedding_A is a sparse tensor"
    if "embed_scale" in base or "embed_scale" in base["_buffers"]:
        return "the base layer has an embed_scale, which PEFT applies to the adapter's part alone"
    if call.layer.__dict__["tp_layer"] is not None:
        return "tensor parallelism: PEFT splits the indices among processes"
    return None


def l8_dtypes(call: Call) -> str | None:
    """The indices are int32 or int64, the parameters floating, and the adapter has one dtype."""
    tensors, x = call.tensors, call.x
    if x is not None and x.dtype not in (torch.int64, torch.int32):
        return f"x is {_dtype(x)}, not indices in int64 or int32"
    adapter = tensors["lora_embedding_A"]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} is {_dtype(tensor)}, not a floating dtype from 16 to 64 bits"
        if name != "base_layer.weight" and tensor.dtype is not adapter.dtype:
            return f"{name} is {_dtype(tensor)}, lora_embedding_A {_dtype(adapter)}"
    if (tensors["base_layer.weight"].dtype is torch.float64) != (adapter.dtype is torch.float64):
        return f"the adapter is {_dtype(adapter)}: float64 is fused with itself only"
    return None


def l15_gathered(call: Call) -> str | None:
    """The parameters have their full shapes (ZeRO-3 gathers a parameter when it is read)."""
    if call.x is None:
        return None
    layer = call.layer.__dict__
    entries, width, rank = layer["in_features"], layer["out_features"], layer["r"][call.adapter]
    shapes = {
        "base_layer.weight": (entries, width),
        "lora_embedding_A": (rank, entries),
        "lora_embedding_B": (width, rank),
        "lora_magnitude_vector.weight": (width,),
    }
    for name, tensor in call.tensors.items():
        if tensor.shape != shapes[name]:
            return f"{name} is {list(tensor.shape)}, not its full shape: partitioned and not gathered"
    return None


ON_MODULES: tuple[Condition, ...] = (
    l5_variant,
    l6_plain_modules,
    conditions.l13_scaling,
    conditions.l10_no_hooks,
)
ON_TENSORS: tuple[Condition, ...] = (
    conditions.l14_plain_execution,
    conditions.l11_plain_tensors,
    l15_gathered,
    conditions.l12_base_weight,
    conditions.l9_autocast,
    l8_dtypes,
)
