"""Feed-forward blocks that run as one node: the class such a module gets, and how a call of it is read.

The class is made of the module's own, as FSDP2 makes one; pickle and deepcopy go by the latter. The three
linears keep their classes: they run one by one whenever the region does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyfastlora.fused.mlp import fused_mlp, product_dtype
from pyfastlora.fused.projection import Projection
from pyfastlora.patching.layers import STATE, FusedForward, LayerState, by_backend, count, reader_of
from pyfastlora.patching.match import GatedMLP, activation_of, could_be_gated_mlp, match
from pyfastlora.patching.read import read


@dataclass(slots=True)
class MLPState:
    """What is remembered of one feed-forward block, for its calls and for the report."""

    formula: GatedMLP | None
    attributes: dict[str, Any] = field(default_factory=dict)  # of the module, when it was matched
    calls_fused: int = 0
    calls_fallback: int = 0
    last_reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether calls run as one node, as far as can be told without the next input."""
        return self.formula is not None and (self.calls_fused > 0 or self.calls_fallback == 0)


def attach(module: nn.Module) -> None:
    """Let a module with patched linears run as one node if that is what it computes; else note why not."""
    if STATE in module.__dict__ or not any(isinstance(child, FusedForward) for child in module.children()):
        return
    if not could_be_gated_mlp(module):
        return
    found = match(module)
    if isinstance(found, str):
        module.__dict__[STATE] = MLPState(None, last_reason=found)
        return
    module.__dict__[STATE] = MLPState(found, _attributes(module))
    module.__class__ = fused_class(type(module), type(module).forward)


class FusedMLP(nn.Module):
    """Runs the whole block as one node where every linear in it can be fused, and else its own forward."""

    #: The class that `unpatch` gives back.
    original: ClassVar[type[nn.Module]]
    #: Its forward when it was matched.
    matched: ClassVar[Callable[..., Any]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: MLPState = self.__dict__[STATE]
        found = _what_changed(self, state) or read_mlp(self, state.formula, args, kwargs)
        if isinstance(found, str):
            count(state, found)
            return super().forward(*args, **kwargs)  # the module's own: next in the order of resolution
        y = found.run()
        for each in (state, *found.layers):
            count(each)
        return y

    def _get_name(self) -> str:
        return self.original.__name__  # in the repr, as for the layers

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)  # of object: how to make one, of what, its state
        kind = type(self)
        return _blank, (kind.original, kind.original.forward is kind.matched), *made[2:]


def fused_class(original: type[nn.Module], matched: Callable[..., Any]) -> type[FusedMLP]:
    """The class for modules of exactly this one, whose forward was this when it was matched."""
    key = (original, matched)
    if key not in _classes:
        members = {"original": original, "matched": matched, "__module__": __name__}
        _classes[key] = type(f"FastLora{original.__name__}", (FusedMLP, original), members)
    return _classes[key]


_classes: dict[tuple[type[nn.Module], Callable[..., Any]], type[FusedMLP]] = {}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What its forward may ask of the module itself, but for its mode, in which it was matched both ways."""
    return {name: v for name, v in module.__dict__.items() if _is_asked(name)}


def _is_asked(name: str) -> bool:
    return name[0] != "_" and name != "training"


def _what_changed(module: FusedMLP, state: MLPState) -> str | None:
    """Why the block may compute another formula than the one that was matched."""
    kind = type(module)
    if kind.original.forward is not kind.matched:
        return f"{kind.original.__name__}.forward was replaced since: unpatch and patch the model again"
    now, then = module.__dict__, state.attributes
    # In a graph the forward before it has to do for those that came: torch 2.11 cannot trace `items`.
    came = [] if torch.compiler.is_compiling() else [n for n in now if n not in then and _is_asked(n)]
    if moved := [*came, *(name for name in then if name not in now)]:
        return f"its {', '.join(sorted(moved))} came or went since: unpatch and patch the model again"
    for name, value in then.items():
        other = now[name]
        equal = type(other) is type(value) and type(value) in _PLAIN and other == value
        if other is not value and not equal:
            return f"its {name} was changed since: unpatch and patch the model again"
    return None


_PLAIN = (bool, int, float, str)


def _blank(original: type[nn.Module], as_matched: bool = True) -> FusedMLP:
    made = fused_class(original, original.forward if as_matched else _another_forward)
    return made.__new__(made)


def _another_forward(*_: Any) -> None:
    """Stands for a forward that was matched and is no longer the class's."""


class Fused(NamedTuple):
    """One call of a block, read."""

    x: Tensor
    inputs: list[Projection]
    down: Projection
    act: str
    gate_first: bool
    layers: list[LayerState]  # of the LoRA layers in it
    backend: str

    def run(self) -> Tensor:
        """What the block gives."""
        with by_backend(self.backend):
            return fused_mlp(self.x, self.inputs, self.down, self.act, gate_first=self.gate_first)


def read_mlp(module: nn.Module, formula: GatedMLP | None, args: Any, kwargs: Any) -> Fused | str:
    """What the call computes, or the first reason against computing it as one node."""
    assert formula is not None
    x = args[0] if args else kwargs.get(formula.argument)
    if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor):
        return "called with other arguments than one tensor"
    children: dict[str, Any] = module.__dict__["_modules"]
    linears = [children.get(name) for name in (*formula.inputs, formula.down)]
    layers = [child.__dict__[STATE] for child in linears if isinstance(child, FusedForward)]
    if not layers:
        return "none of its linears is a patched LoRA layer"
    if any(layer.backend != layers[0].backend for layer in layers):
        return "its linears were patched for different backends"
    act = formula.act or _activation(children.get(formula.act_child))
    if act is None:
        return f"{formula.act_child} is another activation than it was, or has a hook"
    inputs: list[Projection] = []
    for name, child in zip(formula.inputs, linears, strict=False):
        found = projection_of(child, x)
        if isinstance(found, str):
            return f"{name}: {found}"
        inputs.append(found)
    if inputs[0].weight.shape[0] != inputs[-1].weight.shape[0]:
        return "gate and up have different widths"
    # Stands in for the product, which nobody has computed yet: its dtype, device and shape, without memory
    hidden = inputs[0].weight.shape[0] // (3 - len(inputs))
    product = x.new_empty(1, dtype=product_dtype(x, inputs, act)).expand(*x.shape[:-1], hidden)
    down = projection_of(linears[-1], product)
    if isinstance(down, str):
        return f"{formula.down}: {down}"
    return Fused(x, inputs, down, act, formula.gate_first, layers, layers[0].backend)


def projection_of(child: Any, x: Tensor) -> Projection | str:
    """What a linear stands for, or why it does not run inside a region."""
    reader = reader_of(child)
    if reader is None:
        return f"a {type(child).__name__} is neither a patched LoRA layer nor a plain linear"
    reader.prepare(child.__dict__["_modules"]["base_layer"] if isinstance(child, FusedForward) else child, x)
    found = read(reader.kind, child, x, inside=True)
    return found if isinstance(found, (Projection, str)) else "an embedding is no linear"


def _activation(child: nn.Module | None) -> str | None:
    if child is None:
        return None
    state = child.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return None if "forward" in state or any(state[name] for name in hooks) else activation_of(child)
