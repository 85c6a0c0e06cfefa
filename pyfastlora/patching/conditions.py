"""L1 to L15: when a LoRA layer, or a linear beside one, may run fused, as one small function per condition.

Each function looks at one call, taken apart by `read.py`, and returns None or a sentence: what was seen and,
where there is one, the way out. The first sentence of its docstring says what is checked; `docs/fallbacks.md`
is made from the two. A condition has no side effects. They run on every call, so they read `__dict__`,
`_modules` and `_parameters` directly: `nn.Module.__getattr__` costs several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.pytorch_utils import Conv1D

from pyfastlora.weights import bnb_4bit, bnb_8bit, dense

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (nn.Parameter, Tensor)
#: By name: naming the quantised ones would import bitsandbytes, which takes seconds and may not be installed.
FUSED_TYPES = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.layer", "Embedding"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)
#: PEFT's other layers, and what keeps them from being fused.
LEFT_TO_PEFT = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), "convolutions have no fused region"),
    "MultiheadAttention": "nn.MultiheadAttention multiplies with merged weights by itself",
    "ParamWrapper": "its adapter is on a bare parameter (target_parameters)",
    "GPTQLoraLinear": "GPTQ weights cannot be decoded here",
    "AwqLoraLinear": "AWQ weights cannot be decoded here",
    "AqlmLoraLinear": "AQLM weights cannot be decoded here",
    "EetqLoraLinear": "EETQ weights cannot be decoded here",
    "HqqLoraLinear": "HQQ weights cannot be decoded here",
    "IncLoraLinear": "Neural Compressor's weights cannot be decoded here",
    "TorchaoLoraLinear": "torchao weights cannot be decoded here",
    "TeLinear": "Transformer Engine multiplies in formats of its own",
    "LoraParallelLinear": "Megatron splits its weight among processes",
    "SVDLinear": "AdaLoRA's third factor has no fused formula",
}


_counted = False
_stand_ins: tuple[type, ...] = ()


@contextmanager
def memory_counted(*stand_ins: type[Tensor]) -> Iterator[None]:
    """Inside, torch modes are no objection, and tensors of these classes pass for plain ones.

    For a step of which a mode counts the memory, with values or without: it takes the ways of any other step.
    """
    global _counted, _stand_ins
    before = _counted, _stand_ins
    _counted, _stand_ins = True, stand_ins
    try:
        yield
    finally:
        _counted, _stand_ins = before


@dataclass(frozen=True, slots=True)
class Kind:
    """What one class of LoRA layer is fused over: exact types, as a subclass may compute something else."""

    bases: tuple[type, ...]
    weights: tuple[type, ...]
    packed: int  # bits of a quantised base weight; 0: it is dense
    region: str = "linear"  # or "embedding"


@dataclass(slots=True)
class Call:
    """One call of one LoRA layer: what the conditions look at, filled in stage by stage.

    Or of a bare linear, which is a base layer without an adapter.
    """

    kind: Kind
    layer: nn.Module
    x: Tensor | None  # None: the layer is judged before any call, and the conditions on x hold
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    inside: bool = False  # a region computes the layer, whose own hooks would not run
    # stage 2: the one active adapter and the modules PEFT would call; an embedding's factors are no modules
    adapter: str = ""
    base: nn.Module | None = None
    shrink: nn.Module | None = None  # lora_A
    expand: nn.Module | None = None  # lora_B
    dropout: nn.Module | None = None
    magnitude: nn.Module | None = None  # DoRA only
    # stage 3: their parameters, by the names that the sentences use
    tensors: dict[str, Tensor] = field(default_factory=dict)


Condition = Callable[[Call], str | None]


def l1_exact_type(layer: nn.Module) -> str | None:
    """The layer is exactly PEFT's `Linear`, `Linear4bit`, `Linear8bitLt` or `Embedding`, forward included."""
    kind = type(layer)
    if (kind.__module__, kind.__qualname__) not in FUSED_TYPES:
        if kind.__module__.startswith("peft.") and kind.__name__ in LEFT_TO_PEFT:
            return f"{kind.__name__} is left to PEFT: {LEFT_TO_PEFT[kind.__name__]}"
        return f"{kind.__name__} is not exactly PEFT's Linear, Linear4bit, Linear8bitLt or Embedding"
    if kind.forward.__module__ != kind.__module__:
        return f"{kind.__name__}.forward comes from {kind.forward.__module__}, not from PEFT"
    if "forward" in layer.__dict__:
        return f"forward was replaced on the layer by a {_type(layer.__dict__['forward'])}: patch before that"
    return None


def l2_arguments(call: Call) -> str | None:
    """The layer is called with x alone; other arguments are absent or None."""
    if call.args:
        return f"called with {len(call.args)} positional arguments after x"
    for name, value in call.kwargs.items():
        if value is not None:
            return f"called with {name}, which PEFT's forward handles"
    return None


def l3_adapters_on(call: Call) -> str | None:
    """The adapters are enabled and none is merged into the base weight."""
    state = call.layer.__dict__
    if state["_disable_adapters"]:
        return "adapters are disabled: leave disable_adapter() to train"
    if state["merged_adapters"]:
        return f"merged ({', '.join(state['merged_adapters'])}): call unmerge_adapter() to train"
    return None


def l4_one_adapter(call: Call) -> str | None:
    """Exactly one active adapter has weights on the layer."""
    active = active_adapters(call.layer)
    if len(active) == 1:
        return None
    if active:
        return f"{len(active)} active adapters ({', '.join(active)}): set_adapter() to one"
    here = _adapters_here(call.layer)
    return f"no active adapter on this layer; it has {', '.join(here) or 'none'}"


def l5_variant(call: Call) -> str | None:
    """The adapter is plain LoRA, or DoRA without lora_bias, norm caching and CPU offload."""
    variant = call.layer.__dict__["lora_variant"].get(call.adapter)
    if variant is None:
        return None
    if type(variant) is not DoraLinearVariant:
        return f"{_type(variant)} is left to PEFT: fused are plain LoRA and DoRA"
    if type(call.magnitude) is not DoraLinearLayer:
        return f"the magnitude is held by a {_type(call.magnitude)}, not by a DoraLinearLayer"
    if _has_bias(call.expand):
        return "DoRA with lora_bias: PEFT adds the bias to every column of its norm"
    if dora.ENABLE_DORA_CACHING and not call.magnitude.training:
        return "DoraCaching is on: leave it to recompute the norm"
    if call.magnitude.__dict__["_dora_cache"]:
        return "DoraCaching kept a norm: PEFT's forward drops it"
    if call.layer.__dict__["ephemeral_gpu_offload"]:
        return "DoRA with ephemeral_gpu_offload moves weights inside PEFT's forward"
    return None


def l6_plain_modules(call: Call) -> str | None:
    """The base layer is exactly `nn.Linear`, `Conv1D` or bitsandbytes'; lora_A and lora_B are `nn.Linear`."""
    if type(call.base) not in call.kind.bases:
        return f"the base layer is a {_type(call.base)}, not {call.kind.bases[0].__name__}"
    if call.bare:
        return None
    if call.layer.__dict__["fan_in_fan_out"] != (type(call.base) is Conv1D):
        return f"fan_in_fan_out is {call.layer.__dict__['fan_in_fan_out']} over a {_type(call.base)}"
    for name, module in (("lora_A", call.shrink), ("lora_B", call.expand)):
        if type(module) is not nn.Linear:
            return f"{name} is a {_type(module)}, not nn.Linear"
    if _has_bias(call.shrink):
        return "lora_A has a bias, which the fused formula lacks"
    return None


def l7_dropout(call: Call) -> str | None:
    """The dropout is `nn.Identity`, or `nn.Dropout` out of place with p below 1."""
    kind = type(call.dropout)
    if kind is nn.Identity:
        return None
    if kind is not nn.Dropout:
        return f"dropout is {kind.__name__}; fused are Identity and Dropout"
    assert call.dropout is not None
    state = call.dropout.__dict__
    if state["inplace"]:
        return "dropout is in place: it overwrites x"
    return f"dropout p={state['p']} keeps nothing of x" if state["p"] >= 1 else None


def l8_dtypes(call: Call) -> str | None:
    """Floating dtypes that PEFT multiplies without an error; the adapter has one dtype, x is cast to it."""
    tensors, x = call.tensors, call.x
    adapter, weight = tensors.get("lora_A.weight"), tensors["base_layer.weight"]
    for name in ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector.weight"):
        other = tensors.get(name)
        if other is not None and adapter is not None and other.dtype is not adapter.dtype:
            return f"{name} is {_dtype(other)}, lora_A.weight {_dtype(adapter)}"
    for name, tensor in (("x", x), ("the adapter", adapter), ("the base weight", weight)):
        if tensor is not None and tensor.dtype not in FLOATS and not (call.kind.packed and tensor is weight):
            return f"{name} is {_dtype(tensor)}, not a floating dtype from 16 to 64 bits"
    if x is None:
        return None
    name, other = ("the base weight", weight) if adapter is None else ("the adapter", adapter)
    if (x.dtype is torch.float64) != (other.dtype is torch.float64):
        return f"x is {_dtype(x)}, {name} {_dtype(other)}: float64 is fused with itself only"
    casts = adapter is None or call.layer.__dict__["cast_input_dtype_enabled"]
    if not casts and x.dtype is not other.dtype:
        return f"input casting is disabled: x is {_dtype(x)}, the adapter {_dtype(other)}"
    if call.kind.packed or torch.is_autocast_enabled(x.device.type):
        return None
    for name, tensor in (("x", x), ("the base bias", tensors.get("base_layer.bias"))):
        if tensor is not None and tensor.dtype is not weight.dtype:
            return f"{name} is {_dtype(tensor)}, the base weight {_dtype(weight)}, and autocast is off"
    return None


def l9_autocast(call: Call) -> str | None:
    """Under autocast nothing is float64, and bitsandbytes' 8-bit product comes out in autocast's dtype."""
    x = call.x
    if x is None or not torch.is_autocast_enabled(x.device.type):
        return None
    for name, tensor in (("x", x), *call.tensors.items()):
        if tensor.dtype is torch.float64:
            return f"{name} is float64, which autocast leaves as it is"
    if call.kind.packed == 8:
        assert call.base is not None
        cast, weight = torch.get_autocast_dtype(x.device.type), call.tensors["base_layer.weight"]
        if x.dtype is not cast and bnb_8bit.multiplies_integers(weight, call.base.training):
            return f"x is {_dtype(x)} under autocast: the 8-bit output's dtype would depend on x's outliers"
        if call.magnitude is not None and torch.is_autocast_enabled():  # of CUDA, which PEFT asks alone
            return "8-bit DoRA under CUDA autocast: PEFT leaves its output in the adapter's dtype"
    return None


def l10_no_hooks(call: Call) -> str | None:
    """No hook (but ZeRO-3's) and no replaced forward on the modules inside the layer, and no global hook;
    where a region computes the layer, none on itself either.
    """
    for name in _INSIDE:
        module = getattr(call, name)
        if module is None or (name == "layer" and not call.inside):
            continue
        state = module.__dict__
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
            if hooks and not _only_gather(hooks):
                return f"a forward hook sits on {_INSIDE[name]}"
        if state["_backward_hooks"] or state["_backward_pre_hooks"]:
            return f"a backward hook sits on {_INSIDE[name]}"
        if "forward" in state:
            return f"forward was replaced on {_INSIDE[name]} by a {_type(state['forward'])}"
    if _has_any_global_hook():
        return "global module hooks are registered: they would miss the layers inside"
    return None


def l11_plain_tensors(call: Call) -> str | None:
    """Plain strided tensors on one device (no DTensor, no subclass, not meta), and a frozen base weight."""
    x, weight = call.x, call.tensors["base_layer.weight"]
    device = weight.device if x is None else x.device
    if device.type == "meta":
        return "on the meta device: nothing to compute with"
    if x is not None and type(x) not in PLAIN and type(x) not in _stand_ins:
        return f"x is a {_type(x)}, not a plain tensor"
    for name, tensor in call.tensors.items():
        if x is None and _type(tensor) == "DTensor":
            continue  # at rest; FSDP2 puts the plain tensor there for the time of the forward
        plain = call.kind.weights if tensor is weight else PLAIN
        if type(tensor) not in plain and type(tensor) not in _stand_ins:
            return f"{name} is a {_type(tensor)}, not a plain tensor"
        if tensor.device != device:
            return f"{name} is on {tensor.device}, x on {device}"
        if tensor.layout is not torch.strided:
            return f"{name} is {str(tensor.layout).removeprefix('torch.')}, not strided"
    return "base_layer.weight requires grad: fused layers keep it frozen" if weight.requires_grad else None


def l12_base_weight(call: Call) -> str | None:
    """The base weight's format can be read; if quantised, it is whole, fits the layer and is not repacked."""
    weight, base = call.tensors["base_layer.weight"], call.base
    if not call.kind.packed:
        return None if call.x is None else dense.why_not(weight)
    assert base is not None
    if call.x is None and weight.numel() == 0:
        return None  # at rest; ZeRO-3 has it partitioned
    if call.magnitude is not None and type(weight) is not call.kind.weights[0]:
        return f"DoRA over a {_type(weight)}: PEFT decodes only a {call.kind.weights[0].__name__}"
    if call.kind.packed == 8:
        return bnb_8bit.why_not(weight, base.__dict__["state"])
    state = quant_state(base, weight)
    if reason := bnb_4bit.why_not(weight, state, base.__dict__["compute_dtype"]):
        return reason
    layer_shape = (base.__dict__["out_features"], base.__dict__["in_features"])
    if tuple(state.shape) != layer_shape:
        return f"quant_state is for {list(state.shape)}, the layer is {list(layer_shape)}"
    return None


def l13_scaling(call: Call) -> str | None:
    """The scaling is a Python number and the rank is positive."""
    scaling, rank = call.layer.__dict__["scaling"][call.adapter], call.layer.__dict__["r"][call.adapter]
    if type(scaling) not in (float, int):
        return f"scaling is a {_type(scaling)}, not a Python number"
    return f"rank is {rank}, not a positive integer" if type(rank) is not int or rank < 1 else None


def l14_plain_execution(call: Call) -> str | None:
    """Plain eager or compiled execution: no torch.func, tracing, export, forward-mode AD or torch mode."""
    if call.x is None:
        return None
    if torch.compiler.is_compiling():
        # Not is_exporting(): while torch.compile traces, torch 2.11 takes that for constantly true.
        return "torch.export is recording" if torch.compiler._is_exporting_flag else None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform (grad, vmap, ...)"
    if torch._C._is_tracing():
        return "torch.jit.trace is recording"
    if torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode AD"
    if torch._C._len_torch_dispatch_stack() > 0 and not _counted:
        return f"{_type(_get_current_dispatch_mode())} is active: it is to see PEFT's own operations"
    for depth in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(depth)
        if type(mode) is not DeviceContext:  # of torch.set_default_device: it touches factory functions only
            return f"{_type(mode)} is active: it is to see PEFT's own operations"
    return None


def l15_gathered(call: Call) -> str | None:
    """x and the parameters have their full shapes (ZeRO-3 gathers a parameter when it is read)."""
    x, tensors = call.x, call.tensors
    if x is None:
        return None
    layer = call.layer.__dict__
    inputs, outputs = layer["in_features"], layer["out_features"]
    rank = None if call.shrink is None else call.shrink.__dict__["out_features"]
    if x.dim() == 0 or x.shape[-1] != inputs:
        return f"x is {list(x.shape)}; its last dimension has to be {inputs}"
    if x.dim() == 1 and call.magnitude is not None:
        return f"x is {list(x.shape)}: PEFT's DoRA makes a matrix of a vector"
    for name, tensor in tensors.items():
        if name == "base_layer.weight":
            if call.kind.packed == 4:
                full = 2 * tensor.numel() * tensor.element_size() >= outputs * inputs
            else:
                full = tensor.shape == ((inputs, outputs) if type(call.base) is Conv1D else (outputs, inputs))
        elif name == "lora_A.weight":
            full = tensor.shape == (rank, inputs)
        elif name == "lora_B.weight":
            full = tensor.shape == (outputs, rank)
        else:
            full = tensor.shape == (outputs,)
        if not full:
            return f"{name} is {list(tensor.shape)}, not its full shape: partitioned and not gathered"
    return None


#: In three stages: what a layer's own attributes tell, then the modules inside it, then their parameters. No
#: parameter is read before the stages above passed: under ZeRO-3 reading one means gathering it.
ON_LAYER: tuple[Condition, ...] = (l2_arguments, l3_adapters_on, l4_one_adapter)
ON_MODULES: tuple[Condition, ...] = (l5_variant, l6_plain_modules, l7_dropout, l13_scaling, l10_no_hooks)
ON_TENSORS: tuple[Condition, ...] = (
    l14_plain_execution,
    l11_plain_tensors,
    l15_gathered,
    l12_base_weight,
    l9_autocast,
    l8_dtypes,
)

#: The same without those that are about an adapter.
ON_BARE_LAYER = (l2_arguments,)
ON_BARE_MODULES = (l6_plain_modules, l10_no_hooks)

#: Where the hooks come from that DeepSpeed ZeRO-3 puts on every module; the second is a decorator of its own.
_ZERO3 = ("deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx")

_INSIDE = {
    "layer": "the layer itself",
    "base": "base_layer",
    "shrink": "lora_A",
    "expand": "lora_B",
    "dropout": "lora_dropout",
    "magnitude": "lora_magnitude_vector",
}


def active_adapters(layer: nn.Module) -> list[str]:
    """The active adapters that have weights on this layer, in PEFT's order."""
    active = layer.__dict__["_active_adapter"]
    here = _adapters_here(layer)
    if isinstance(active, str):
        return [active] if active in here else []
    return [name for name in active if name in here]


def quant_state(base: nn.Module | None, weight: Tensor) -> Any:
    """The weight's quant_state, or the copy on its layer: FSDP rebuilds the parameter and loses the first."""
    state = getattr(weight, "quant_state", None)
    return getattr(base, "quant_state", None) if state is None else state


def _adapters_here(layer: nn.Module) -> Collection[str]:
    modules = layer.__dict__["_modules"]
    linear: dict[str, nn.Module] = modules["lora_A"].__dict__["_modules"]
    return linear or modules["lora_embedding_A"].__dict__["_keys"]


def _only_gather(hooks: dict[int, Any]) -> bool:
    """Whether these are DeepSpeed ZeRO-3's: they gather parameters, which reading them does as well."""
    return all(hook.__module__ in _ZERO3 for hook in hooks.values())


def _has_bias(module: nn.Module | None) -> bool:
    if module is None:
        return False
    # a replica of DataParallel and a module in FSDP1's hands hold plain tensors as attributes
    return module.__dict__["_parameters"].get("bias", module.__dict__.get("bias")) is not None


def _type(value: object) -> str:
    return type(value).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
