"""From a PEFT LoRA layer to a `Projection`, or to the sentence that says why PEFT's own forward runs.

Nothing is kept between calls: tensors are read from the modules each time, so that replaced parameters,
ZeRO-3's gathering, FSDP2's unsharding and a changed scaling or adapter are seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyfastlora.fused.embedding import AdaptedEmbedding
from pyfastlora.fused.projection import Projection
from pyfastlora.patching import conditions, conditions_embedding
from pyfastlora.patching.conditions import Call, Kind
from pyfastlora.weights import FrozenWeight
from pyfastlora.weights.bnb_4bit import Bnb4bitWeight
from pyfastlora.weights.bnb_8bit import Bnb8bitWeight
from pyfastlora.weights.dense import DenseWeight


def read(
    kind: Kind,
    layer: nn.Module,
    x: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    inside: bool = False,
) -> Projection | AdaptedEmbedding | str:
    """What layer(x, *args, **kwargs) stands for, by its kind, or the first condition that does not hold.

    The layer is a LoRA layer of this kind, or a linear such as one has as its base. `inside`: a region stands
    for it, and its own call does not run.
    """
    call = Call(kind, layer, x, args, kwargs or {}, type(layer) in kind.bases, inside)
    if kind.region == "embedding":
        return _why_not(call) or _embedding(call)
    if kind.packed != 4:
        return _why_not(call) or _projection(call)
    # a Params4bit sends each look at its dtype, shape or device through __torch_function__: 1 us for 0.05
    with torch._C.DisableTorchFunctionSubclass():
        return _why_not(call) or _projection(call)


def standing_reason(kind: Kind, layer: nn.Module) -> str | None:
    """Why no call of the layer would run fused as it stands: the conditions that need no input."""
    return _why_not(Call(kind, layer, None))


def trainable(kind: Kind, layer: nn.Module) -> dict[str, Tensor]:
    """The parameters that take a gradient, by name, of a layer that has no standing reason."""
    call = Call(kind, layer, None)
    _take_apart(call)
    _read_tensors(call)
    return {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}


def _why_not(call: Call) -> str | None:
    for condition in conditions.ON_BARE_LAYER if call.bare else conditions.ON_LAYER:
        if reason := condition(call):
            return reason
    stages = conditions_embedding if call.kind.region == "embedding" else conditions
    _take_apart(call)
    for condition in conditions.ON_BARE_MODULES if call.bare else stages.ON_MODULES:
        if reason := condition(call):
            return reason
    _read_tensors(call)
    for condition in stages.ON_TENSORS:
        if reason := condition(call):
            return reason
    return None


def _take_apart(call: Call) -> None:
    if call.bare:
        call.base = call.layer
        return
    children = call.layer.__dict__["_modules"]
    (adapter,) = conditions.active_adapters(call.layer)
    call.adapter = adapter
    call.base = children["base_layer"]
    if call.layer.__dict__["lora_variant"]:
        call.magnitude = children["lora_magnitude_vector"].__dict__["_modules"].get(adapter)
    if call.kind.region == "embedding":
        return
    call.shrink = children["lora_A"].__dict__["_modules"][adapter]
    call.expand = children["lora_B"].__dict__["_modules"][adapter]
    call.dropout = children["lora_dropout"].__dict__["_modules"][adapter]


def _read_tensors(call: Call) -> None:
    wanted = [("base_layer.weight", call.base, "weight")]
    if call.kind.region == "embedding":
        children = call.layer.__dict__["_modules"]
        for name in ("lora_embedding_A", "lora_embedding_B"):
            wanted.append((name, children[name], call.adapter))
    else:
        wanted += [
            ("base_layer.bias", call.base, "bias"),
            ("lora_A.weight", call.shrink, "weight"),
            ("lora_B.weight", call.expand, "weight"),
            ("lora_B.bias", call.expand, "bias"),
        ]
    wanted.append(("lora_magnitude_vector.weight", call.magnitude, "weight"))
    for name, module, attribute in wanted:
        if module is None:
            continue
        try:
            # indexed, not .get: DeepSpeed ZeRO-3 gathers a partitioned parameter in __getitem__
            tensor = module.__dict__["_parameters"][attribute]
        except KeyError:  # a DataParallel replica holds plain tensors as attributes
            tensor = getattr(module, attribute)
        if tensor is not None:
            call.tensors[name] = tensor


def _projection(call: Call) -> Projection:
    tensors = call.tensors
    return Projection(
        weight=_frozen(call, tensors["base_layer.weight"]),
        bias=tensors.get("base_layer.bias"),
        lora_A=tensors.get("lora_A.weight"),
        lora_B=tensors.get("lora_B.weight"),
        lora_bias=tensors.get("lora_B.bias"),
        scaling=1.0 if call.bare else float(call.layer.__dict__["scaling"][call.adapter]),
        dropout=_dropout(call),
        magnitude=tensors.get("lora_magnitude_vector.weight"),
    )


def _embedding(call: Call) -> AdaptedEmbedding:
    assert call.base is not None
    tensors, base = call.tensors, call.base.__dict__
    return AdaptedEmbedding(
        weight=tensors["base_layer.weight"],
        lora_A=tensors["lora_embedding_A"],
        lora_B=tensors["lora_embedding_B"],
        scaling=float(call.layer.__dict__["scaling"][call.adapter]),
        magnitude=tensors.get("lora_magnitude_vector.weight"),
        padding_idx=base["padding_idx"],
        scale_grad_by_freq=base["scale_grad_by_freq"],
    )


def _frozen(call: Call, weight: Tensor) -> FrozenWeight:
    if not call.kind.packed:
        return DenseWeight(weight, transposed=type(call.base) is Conv1D)
    assert call.base is not None
    base = call.base.__dict__
    if call.kind.packed == 8:
        return Bnb8bitWeight.of(weight, base["state"], base["training"])
    return Bnb4bitWeight.of(weight, conditions.quant_state(call.base, weight), base["compute_dtype"])


def _dropout(call: Call) -> float:
    if call.dropout is None:
        return 0.0
    state = call.dropout.__dict__
    # DoRA asks the layer's own mode before it calls the dropout, plain LoRA only the dropout's
    active = state["training"] and (call.magnitude is None or call.layer.training)
    return state["p"] if active and "p" in state else 0.0
