"""A small random batch through a fused layer and through its PEFT forward: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyfastlora.fused.embedding import AdaptedEmbedding, fused_embedding
from pyfastlora.fused.projection import Projection
from pyfastlora.fused.projections import fused_projections
from pyfastlora.patching.conditions import Kind, active_adapters
from pyfastlora.patching.layers import FusedForward
from pyfastlora.patching.match import GatedMLP
from pyfastlora.patching.mlp import read_mlp
from pyfastlora.patching.read import read, standing_reason, trainable

#: Largest accepted ||ours - PEFT|| / ||PEFT|| of the output and of each gradient, by the coarsest dtype
#: involved. Both sides round, so they differ by a few units in the last place: 4e-3 in bfloat16, 5e-4 in
#: float16, and 5e-4 in float32 where TF32 is on. A wrong formula or a misread weight is off by far more.
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}

_ROWS = 8


class Outcome(NamedTuple):
    """What one probe found."""

    error: float | None
    note: str = ""
    refusal: str = ""  # the reason to leave the layer on PEFT


def probe(layer: Any) -> Outcome:
    """Compare a patched layer without a standing reason to its PEFT forward, in the mode it is in.

    Compared are the output and the gradients of x and of every trainable parameter. The random numbers come
    from a forked generator and the gradients from `torch.autograd.grad`, so that no generator and no
    `.grad` changes; hooks on the layer and its call counters see nothing of it.
    """
    parameters = trainable(layer.kind, layer)
    with _undisturbed(layer) as (x, dy):
        found = read(layer.kind, layer, x)
        if isinstance(found, str):
            return Outcome(None, note=f"not verified: {found}")
        ours = _run(lambda: layer.run_fused(x, found), x, parameters, dy)
        theirs = _run(lambda: layer.peft_class.forward(layer, x), x, parameters, dy)
    return _outcome(ours, theirs, [dy, *parameters.values()], [layer])


def probe_mlp(block: Any, formula: GatedMLP) -> Outcome:
    """Compare a feed-forward block as one node to its own forward around PEFT's layers, as `probe` does."""
    children: dict[str, Any] = dict(block.named_children())
    layers = {name: child for name, child in children.items() if isinstance(child, FusedForward)}
    first, last = children[formula.inputs[0]], children[formula.down]
    with _undisturbed(next(iter(layers.values())), first, last) as (x, dy):
        found = read_mlp(block, formula, (x,), {})
        if isinstance(found, str):
            return Outcome(None, note=f"not verified: {found}")
        parameters = {
            f"{name}.{key}": parameter
            for name, layer in layers.items()
            for key, parameter in trainable(layer.kind, layer).items()
        }
        ours = _run(found.run, x, parameters, dy)
        with _as_peft_made_them(layers.values()):
            theirs = _run(lambda: block.original.forward(block, x), x, parameters, dy)
    return _outcome(ours, theirs, [dy, *parameters.values()], list(layers.values()))


def _outcome(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tensors: list[Tensor], layers: list[Any]
) -> Outcome:
    errors = {name: _difference(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    bound = max(BOUNDS[tensor.dtype] for tensor in tensors)
    zero = next(filter(None, map(_zero_factor, layers)), "")
    note = f"the adapter is still zero ({zero} = 0)" if zero else ""
    if errors[worst] <= bound:
        return Outcome(errors[worst], note)
    if misread := list(filter(misread_by_bitsandbytes, layers)):
        base = misread[0].base_layer
        columns, blocksize = base.in_features, base.weight.quant_state.blocksize
        return Outcome(
            errors[worst], f"PEFT is off: bitsandbytes misreads {columns} columns in blocks of {blocksize}"
        )
    return Outcome(errors[worst], note, f"verify: {worst} is {errors[worst]:.1e} off PEFT, above {bound:.0e}")


def run_once(kind: Kind, layer: Any) -> bool:
    """One fused forward and backward, for what they may raise; False if a condition rules the layer out."""
    if standing_reason(kind, layer):
        return False
    with _undisturbed(layer) as (x, dy):
        found = read(kind, layer, x)
        if isinstance(found, str):
            return False
        _run(lambda: _fused(x, found), x, trainable(kind, layer), dy)
    return True


def probe_dtype(layer: Any) -> torch.dtype:
    """The dtype of input that the base layer computes in when autocast is off."""
    base = layer.base_layer
    if base.weight.dtype == torch.int8:  # any, but bitsandbytes casts the bias to it for good
        return torch.float32 if base.bias is None else base.bias.dtype
    state = getattr(base.weight, "quant_state", None)
    return base.weight.dtype if state is None else base.compute_dtype or state.dtype


@contextmanager
def _undisturbed(layer: Any, first: Any = None, last: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
    """A random x and dy for the layer, in a context that leaves generators and modes as they are.

    With the sizes of the linears `first` and `last` where it is one of a block.
    """
    device, dtype = layer.base_layer.weight.device, probe_dtype(layer)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(0)
        inputs, outputs = (first or layer).in_features, (last or layer).out_features
        if isinstance(layer.base_layer, nn.Embedding):
            x = torch.randint(inputs, (_ROWS,), device=device)
        else:
            x = torch.randn(_ROWS, inputs, device=device, dtype=dtype).requires_grad_()
        yield x, torch.randn(_ROWS, outputs, device=device, dtype=dtype)


@contextmanager
def _as_peft_made_them(layers: Iterable[Any]) -> Iterator[None]:
    """The layers with PEFT's own classes for a while."""
    classes = [(layer, type(layer)) for layer in layers]
    for layer, _ in classes:
        layer.__class__ = layer.peft_class
    try:
        yield
    finally:
        for layer, kind in classes:
            layer.__class__ = kind


def misread_by_bitsandbytes(layer: Any) -> bool:
    """Whether bitsandbytes 0.50 dequantises the base weight of a patched layer wrongly, on this device.

    Its AVX-512 kernel takes K // blocksize scales per row, too few where blocks run across the ends of
    rows. It is used when K is a multiple of 16; other sizes take a correct scalar loop.
    """
    base = layer.base_layer
    if layer.kind.packed != 4 or base.weight.device.type != "cpu":
        return False
    return base.in_features % base.weight.quant_state.blocksize != 0 and base.in_features % 16 == 0


def _run(
    forward: Callable[[], Tensor], x: Tensor, parameters: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the same dropout mask on both sides
    y = forward()
    wanted = ({"x": x} if x.requires_grad else {}) | parameters
    gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    named = (f"the gradient of {name}" for name in wanted)
    return {"the output": y.detach(), **dict(zip(named, gradients, strict=True))}


def _fused(x: Tensor, found: Projection | AdaptedEmbedding) -> Tensor:
    if isinstance(found, AdaptedEmbedding):
        return fused_embedding(x, found)
    return fused_projections(x, [found])[0]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    distance, size = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
    if distance == 0:
        return 0.0
    return distance / size if size > 0 and distance == distance else float("inf")


def _zero_factor(layer: Any) -> str:
    """The factor that PEFT begins with as zero, while it is: B, of an embedding A; else ""."""
    (adapter,) = active_adapters(layer)
    if isinstance(layer.base_layer, nn.Embedding):
        return "" if layer.lora_embedding_A[adapter].any() else "A"
    return "" if layer.lora_B[adapter].weight.any() else "B"
