"""Which modules are gated feed-forward blocks: told from what their forward does, not from their class.

A `torch.fx` trace with every child as a leaf has to be exactly

    down(act(gate(x)) * up(x))      or      first, second = gate_up(x).chunk(2, dim=-1)

with one of the halves as gate, in either order of the product. Whatever else is in it, a clamp, a factor, a
norm, a dropout, is named in the reason for leaving the module alone.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pyfastlora.ops.glu import ACTS


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)), by the names of the module's children."""

    argument: str  # x, in the module's forward
    inputs: tuple[str, ...]  # gate and up in the order of their calls, or the one linear of both
    down: str
    gate_first: bool  # of the two inputs, or of the halves
    act: str  # of ops.glu.ACTS; "": what the child `act_child` is
    act_child: str = ""


def could_be_gated_mlp(module: nn.Module) -> bool:
    """Whether the sizes of the module's linears and the arguments of its forward are those of a gated MLP."""
    linears = [child for child in module.children() if is_linear(child)]
    sizes: list[tuple[Any, Any]] = [(each.in_features, each.out_features) for each in linears]
    if len(sizes) == 3:
        fits = any(
            sizes[i - 1] == sizes[i - 2] and sizes[i - 1][1] == sizes[i][0] for i in range(3)
        )  # the other two are alike and feed this one
    elif len(sizes) == 2:
        fits = any(sizes[i - 1][1] == 2 * sizes[i][0] for i in range(2))
    else:
        return False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return fits and len(parameters) == 1 and parameters[0].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD


def is_linear(module: nn.Module) -> bool:
    """Whether the module has the sizes of a linear, as PEFT's layers over one have them too."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def match(module: nn.Module) -> GatedMLP | str:
    """What the module's forward is, or why it is not one of a gated MLP."""
    before = dict(module.__dict__)
    if "forward" in before:
        return "its forward was replaced on the module"
    found = []
    try:
        for module.training in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    found.append(_formula(module, _Tracer().trace(module)))
    except Exception as error:  # whatever a forward raises that was not made for it
        return f"its forward cannot be traced: {str(error).partition(chr(10))[0]}"
    finally:
        module.training = before["training"]
    after = module.__dict__
    changed = after.keys() != before.keys() or any(after[name] is not before[name] for name in before)
    if changed:  # by the forward, or by the tracer, which puts constants on the module
        after.clear()
        after.update(before)
    first, *others = found
    if isinstance(first, str):
        return first
    if any(other != first for other in others):
        return "its forward is another one in evaluation or without gradients"
    return "its forward changes the module" if changed else first


def activation_of(module: nn.Module) -> str | None:
    """The name in `ops.glu.ACTS` of an activation module; None: it is none of them."""
    kind, state = type(module), module.__dict__
    if kind in (nn.SiLU, nn.ReLU):
        return None if state["inplace"] else kind.__name__.lower()
    if kind is nn.GELU:
        return _GELUS.get(state["approximate"])
    if kind.__module__ != "transformers.activations":
        return None
    if kind.__name__ in ("GELUActivation", "GELUTanh"):  # their flags choose formulas written out in torch
        return _activation(state["act"], {})
    return _TRANSFORMERS.get(kind.__name__)


_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_TRANSFORMERS = {"SiLUActivation": "silu", "PytorchGELUTanh": "gelu_tanh", "ReLUSquaredActivation": "relu2"}


def _activation(function: Callable[..., Any], options: dict[str, Any]) -> str | None:
    """The name of act where function(x, **options) is act(x)."""
    if type(function) is functools.partial and not function.args:
        return _activation(function.func, {**function.keywords, **options})
    if function is F.gelu and options.keys() <= {"approximate"}:
        return _GELUS.get(options.get("approximate", "none"))
    if function in (F.silu, F.relu, torch.relu) and not options.get("inplace"):
        return "silu" if function is F.silu else "relu"
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _MismatchError(Exception):
    """A node is not what is looked for in its place."""


def _formula(module: nn.Module, graph: fx.Graph) -> GatedMLP | str:
    """What a traced forward is, or what it has that a gated MLP has not."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    output = next(node for node in graph.nodes if node.op == "output")
    reader = _Reader(module)
    try:
        down, product = reader.linear(output.args[0])
        act, act_child, gate, up = reader.gated(product)
        inputs, gate_first = reader.packed(gate, up, x) or reader.two(gate, up, x)
    except _MismatchError:
        return _what_else(module, graph)
    names = {*inputs, down}
    if {x, output, *reader.known} != set(graph.nodes) or len(names) != len(inputs) + 1:
        return _what_else(module, graph)
    if not act and activation_of(module.get_submodule(act_child)) is None:
        kind = type(module.get_submodule(act_child)).__name__
        return f"its activation is a {kind}; fused are {', '.join(ACTS)}"
    return GatedMLP(str(x.target), inputs, down, gate_first, act, act_child)


class _Reader:
    """Takes nodes of a traced forward apart, and remembers in `known` those that were understood."""

    def __init__(self, module: nn.Module) -> None:
        self.children = dict(module.named_children())
        self.known: list[fx.Node] = []

    def linear(self, node: Any) -> tuple[str, fx.Node]:
        """(name, input) of the call of a linear."""
        name, argument = self._child(node)
        if not is_linear(self.children[name]):
            raise _MismatchError
        self.known.append(node)
        return name, argument

    def gated(self, node: fx.Node) -> tuple[str, str, fx.Node, fx.Node]:
        """(act, its child, gate, up) of a product."""
        times = node.op == "call_function" and node.target in (operator.mul, torch.mul)
        times |= node.op == "call_method" and node.target == "mul"
        if not times or len(node.args) != 2 or node.kwargs:
            raise _MismatchError
        first, second = (factor for factor in node.args)
        acts = [self._activation(factor) for factor in (first, second)]
        if (acts[0] is None) == (acts[1] is None):
            raise _MismatchError
        activated, up, found = (first, second, acts[0]) if acts[0] else (second, first, acts[1])
        assert found is not None and isinstance(activated, fx.Node)
        if not isinstance(up, fx.Node):
            raise _MismatchError
        self.known += [node, activated]
        return *found, up

    def two(self, gate: fx.Node, up: fx.Node, x: fx.Node) -> tuple[tuple[str, ...], bool]:
        """(names in the order of their calls, whether gate is the first) of two linears of x."""
        (gate_name, of_gate), (up_name, of_up) = self.linear(gate), self.linear(up)
        if of_gate is not x or of_up is not x:
            raise _MismatchError
        gate_first = gate < up
        return (gate_name, up_name) if gate_first else (up_name, gate_name), gate_first

    def packed(self, gate: fx.Node, up: fx.Node, x: fx.Node) -> tuple[tuple[str, ...], bool] | None:
        """(the one name, whether gate is the first half) of the halves of one linear of x."""
        if gate.target is not operator.getitem or up.target is not operator.getitem:
            return None
        (halves, gate_index), (also, up_index) = gate.args, up.args
        if halves is not also or {gate_index, up_index} != {0, 1} or not isinstance(halves, fx.Node):
            raise _MismatchError
        if halves.target not in ("chunk", torch.chunk) or (*halves.args[1:], *halves.kwargs.values()) != (
            2,
            -1,
        ):
            raise _MismatchError
        name, argument = self.linear(halves.args[0])
        if argument is not x:
            raise _MismatchError
        self.known += [gate, up, halves]
        return (name,), bool(gate_index == 0)

    def _activation(self, node: Any) -> tuple[str, str, fx.Node] | None:
        """(act, "", input) of a function, ("", name, input) of a child that is no linear, or None."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "call_function" and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            act = _activation(node.target, node.kwargs)  # type: ignore[arg-type]
            return (act, "", node.args[0]) if act else None
        try:
            name, argument = self._child(node)
        except _MismatchError:
            return None
        return None if is_linear(self.children[name]) else ("", name, argument)

    def _child(self, node: Any) -> tuple[str, fx.Node]:
        """(name, input) of the call of a child with one tensor."""
        called = isinstance(node, fx.Node) and node.op == "call_module" and node.target in self.children
        if not called or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise _MismatchError
        return str(node.target), node.args[0]


def _what_else(module: nn.Module, graph: fx.Graph) -> str:
    found = []
    products = 0
    for node in graph.nodes:
        if node.op == "call_module":
            child = module.get_submodule(node.target)
            if not is_linear(child) and activation_of(child) is None:
                found.append(type(child).__name__)
        elif node.target in (operator.mul, torch.mul, "mul"):
            products += 1
            if products > 1 or not all(isinstance(arg, fx.Node) for arg in node.args):
                found.append("a further factor")
        elif node.op == "call_function" and node.target not in (operator.getitem, torch.chunk):
            if _activation(node.target, node.kwargs) is None:
                found.append(getattr(node.target, "__name__", str(node.target)))
        elif node.op == "call_method" and node.target != "chunk":
            found.append(str(node.target))
    what = f"has {', '.join(dict.fromkeys(found))} in it" if found else "combines them in another way"
    return f"its forward is not down(act(gate(x)) * up(x)): it {what}"
