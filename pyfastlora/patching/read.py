"""From a PEFT LoRA layer to a `Projection`, or to the sentence that says why PEFT's own forward runs.

Nothing is kept between calls: tensors are read from the modules each time, so that replaced parameters,
ZeRO-3's gathering, FSDP2's unsharding and a changed scaling or adapter are seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfastlora.fused.projections import Projection
from pyfastlora.patching import conditions
from pyfastlora.patching.conditions import Call, Kind
from pyfastlora.weights import FrozenWeight
from pyfastlora.weights.bnb_4bit import Bnb4bitWeight
from pyfastlora.weights.dense import DenseWeight


def read(
    kind: Kind, layer: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Projection | str:
    """The projection that layer(x, *args, **kwargs) stands for, or the first condition that does not hold."""
    call = Call(kind, layer, x, args, kwargs or {})
    if not kind.packed:
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
    for condition in conditions.ON_LAYER:
        if reason := condition(call):
            return reason
    _take_apart(call)
    for condition in conditions.ON_MODULES:
        if reason := condition(call):
            return reason
    _read_tensors(call)
    for condition in conditions.ON_TENSORS:
        if reason := condition(call):
            return reason
    return None


def _take_apart(call: Call) -> None:
    children = call.layer.__dict__["_modules"]
    (adapter,) = conditions.active_adapters(call.layer)
    call.adapter = adapter
    call.base = children["base_layer"]
    call.shrink = children["lora_A"].__dict__["_modules"][adapter]
    call.expand = children["lora_B"].__dict__["_modules"][adapter]
    call.dropout = children["lora_dropout"].__dict__["_modules"][adapter]
    if call.layer.__dict__["lora_variant"]:
        call.magnitude = children["lora_magnitude_vector"].__dict__["_modules"].get(adapter)


def _read_tensors(call: Call) -> None:
    wanted = [
        ("base_layer.weight", call.base, "weight"),
        ("base_layer.bias", call.base, "bias"),
        ("lora_A.weight", call.shrink, "weight"),
        ("lora_B.weight", call.expand, "weight"),
        ("lora_B.bias", call.expand, "bias"),
    ]
    if call.magnitude is not None:
        wanted.append(("lora_magnitude_vector.weight", call.magnitude, "weight"))
    for name, module, attribute in wanted:
        try:
            # indexed, not .get: DeepSpeed ZeRO-3 gathers a partitioned parameter in __getitem__
            tensor = module.__dict__["_parameters"][attribute]
        except KeyError:  # a DataParallel replica holds plain tensors as attributes
            tensor = getattr(module, attribute)
        if tensor is not None:
            call.tensors[name] = tensor


def _projection(call: Call) -> Projection:
    tensors = call.tensors
    weight = tensors["base_layer.weight"]
    if call.kind.packed:
        assert call.base is not None
        state = conditions.quant_state(call.base, weight)
        frozen: FrozenWeight = Bnb4bitWeight.of(weight, state, call.base.__dict__["compute_dtype"])
    else:
        frozen = DenseWeight(weight)
    return Projection(
        weight=frozen,
        bias=tensors.get("base_layer.bias"),
        lora_A=tensors["lora_A.weight"],
        lora_B=tensors["lora_B.weight"],
        lora_bias=tensors.get("lora_B.bias"),
        scaling=float(call.layer.__dict__["scaling"][call.adapter]),
        dropout=_dropout(call),
        magnitude=tensors.get("lora_magnitude_vector.weight"),
    )


def _dropout(call: Call) -> float:
    assert call.dropout is not None
    state = call.dropout.__dict__
    # DoRA asks the layer's own mode before it calls the dropout, plain LoRA only the dropout's
    active = state["training"] and (call.magnitude is None or call.layer.training)
    return state["p"] if active and "p" in state else 0.0
