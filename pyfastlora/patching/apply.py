"""`patch`, `unpatch` and `report`: the only code that changes a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from pyfastlora.ops._registry import BackendError, all_ops, problem_of
from pyfastlora.ops._registry import backend as use_backend
from pyfastlora.patching import cpu_repack
from pyfastlora.patching.conditions import l1_exact_type
from pyfastlora.patching.groups import Siblings, forget, watch
from pyfastlora.patching.layers import STATE, FastLoraLinear, FusedForward, LayerState
from pyfastlora.patching.layers_embedding import FastLoraEmbedding
from pyfastlora.patching.loss import FusedLoss, attach_loss, loss_line
from pyfastlora.patching.mlp import FusedMLP, MLPState, attach
from pyfastlora.patching.read import standing_reason
from pyfastlora.patching.report import PatchReport, Row
from pyfastlora.patching.verify import probe, probe_dtype, probe_mlp, run_once


def patch(
    model: nn.Module, *, backend: str = "auto", verify: bool = False, loss: bool = False
) -> PatchReport:
    """Let the LoRA layers of a PEFT model, and whole feed-forward blocks, run fused where that gives PEFT's
    result, in place.

    backend: "auto", or what `pyfastlora.backend` takes ("reference", "dora_norm=cpu", ...): it then holds for
    every call of these layers, and a call that it cannot serve raises with the reason of each candidate.
    verify: run a small random batch, forward and backward, through every fused layer and through its PEFT
    forward; a layer that differs by more than `pyfastlora.patching.verify.BOUNDS` allows is left on PEFT.
    Then the same with every feed-forward block; one that differs is left to run its linears one by one.
    loss: also let causal models of transformers compute their loss in chunks of tokens, without whole logits
    (fused/cross_entropy.py); the report's `loss` says which do, and why one does not.

    Every module keeps its parameters, its state_dict keys and its class as a base class. Calls that a
    condition rules out (docs/fallbacks.md) run PEFT's forward. On bitsandbytes' 4-bit layers, adapted or
    not, the switch that lets them repack their weight for CPU inference is turned off. Patching twice
    changes nothing but the backend.

    Returns the report; `pyfastlora.report(model)` gives it again with the calls made since. Raises TypeError
    for what is no module, ValueError for a backend that does not exist and, before anything is changed,
    BackendError for one that cannot run these layers here.
    """
    _check_model("patch", model)
    if backend != "auto":
        _try_backend(model, backend)
    for module in model.modules():
        cpu_repack.forbid(module)
    for _, layer in _lora_layers(model):
        if isinstance(layer, FusedForward):
            layer.__dict__[STATE].backend = backend
        elif l1_exact_type(layer) is None and STATE not in layer.__dict__:
            layer.__dict__[STATE] = LayerState(backend)
            _become(layer, _fast_class(layer))
    for module in model.modules():
        attach(module)
    if loss:
        _attach_losses(model)
    if verify:
        _verify(model)
    _introduce(model)
    return report(model)


def unpatch(model: nn.Module) -> None:
    """Give every layer of the model its own class and attributes back; an unpatched model stays as it is.

    Raises RuntimeError, before anything is changed, if something else has since changed a layer's class.
    """
    _check_model("unpatch", model)
    patched: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if STATE in m.__dict__]
    for name, module in patched:
        made = {FusedForward: "peft_class", FusedMLP: "original", FusedLoss: "original"}
        if any(isinstance(module, of) and own not in type(module).__dict__ for of, own in made.items()):
            raise RuntimeError(
                f"unpatch: {name} became a {type(module).__name__} after it was patched; undo that first "
                "(FSDP2: unpatch before fully_shard)"
            )
    for _, module in patched:
        if isinstance(module, FusedForward):
            _become(module, module.peft_class)
        elif isinstance(module, FusedMLP | FusedLoss):
            _become(module, module.original)
        del module.__dict__[STATE]
    for module in model.modules():
        forget(module)
        cpu_repack.allow(module)


def report(model: nn.Module) -> PatchReport:
    """How each LoRA layer of the model runs, with the calls counted since it was patched.

    Fused and PEFT calls count forwards, so a checkpointed layer counts its recomputation too; calls inside a
    `torch.compile` graph are not counted.
    """
    _check_model("report", model)
    blocks = {
        child: module.__dict__[STATE]
        for module in model.modules()
        if isinstance(module.__dict__.get(STATE), MLPState)
        for child in module.children()
    }
    rows = [_row(name, layer, blocks.get(layer)) for name, layer in _lora_layers(model)]
    return PatchReport(rows, [line for module in model.modules() if (line := loss_line(module))])


def _attach_losses(model: nn.Module) -> None:
    for module in model.modules():
        attach_loss(module)


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module; got {type(model).__name__}")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _fast_class(layer: nn.Module) -> type[FusedForward]:
    name = type(layer).__name__
    if name == "Linear":
        return FastLoraLinear
    if name == "Embedding":
        return FastLoraEmbedding
    # here, not above: these import bitsandbytes, which a model with such a layer has loaded anyway
    if name == "Linear8bitLt":
        from pyfastlora.patching.layers_8bit import FastLoraLinear8bitLt

        return FastLoraLinear8bitLt
    from pyfastlora.patching.layers_4bit import FastLoraLinear4bit

    return FastLoraLinear4bit


def _introduce(model: nn.Module) -> None:
    """Tell the patched linears of each parent of one another; those that are fed one tensor will find out."""
    for parent in model.modules():
        found = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, FusedForward) and child.kind.region == "linear"
        }
        states = [child.__dict__[STATE] for child in found.values()]
        if len(found) < 2 or all(state.siblings is not None for state in states):
            continue
        siblings = Siblings(tuple(found), tuple(map(weakref.ref, found.values())))
        for place, state in enumerate(states):
            state.siblings, state.place = siblings, place
        watch(parent, siblings)


def _become(layer: Any, cls: type[nn.Module]) -> None:
    layer.__class__ = cls


def _try_backend(model: nn.Module, spec: str) -> None:
    """Run one layer of each sort by the backend, before anything is changed: raises what a call would."""
    with use_backend(spec):  # raises for an unknown name, with or without LoRA layers
        tried = set()
        for _, layer in _lora_layers(model):
            if isinstance(layer, FusedForward):
                kind = layer.kind
            elif l1_exact_type(layer) is None:
                kind = _fast_class(layer).kind
            else:
                continue
            weight = layer.base_layer.weight
            sort = (kind, weight.device, weight.dtype, *map(type, layer.lora_variant.values()))
            if sort not in tried and run_once(kind, layer):
                tried.add(sort)


def _verify(model: nn.Module) -> None:
    for _, layer in _lora_layers(model):
        if not isinstance(layer, FusedForward) or standing_reason(layer.kind, layer):
            continue
        state: LayerState = layer.__dict__[STATE]
        outcome = probe(layer)
        state.error, state.note, state.refused = outcome.error, outcome.note, outcome.refusal
        if state.refused:
            _become(layer, layer.peft_class)
    for module in model.modules():
        if isinstance(module, FusedMLP):
            _verify_mlp(module, module.__dict__[STATE])


def _verify_mlp(module: FusedMLP, block: MLPState) -> None:
    layers = [child.__dict__[STATE] for child in module.children() if isinstance(child, FusedForward)]
    if block.formula is None or not layers:
        return
    outcome = probe_mlp(module, block.formula)
    for state in layers:
        state.error = max(state.error or 0.0, outcome.error or 0.0)
    if outcome.refusal:
        block.formula, block.last_reason = None, outcome.refusal
        _become(module, module.original)


def _row(name: str, layer: Any, block: MLPState | None) -> Row:
    state = layer.__dict__.get(STATE) or LayerState()
    if isinstance(layer, FusedForward):
        peft_class, standing = layer.peft_class, standing_reason(layer.kind, layer) or ""
    else:
        peft_class = type(layer)
        standing = state.refused or l1_exact_type(layer) or "not patched: call pyfastlora.patch(model)"
    fused = not standing and (state.calls_fused > 0 or state.calls_fallback == 0)
    return Row(
        name=name,
        layer=peft_class.__name__,
        fused=fused,
        region=_region(layer, state, block) if fused else "none",
        backend=_backend_of(layer, state) if fused else "",
        reason=standing or state.last_reason,
        calls_fused=state.calls_fused,
        calls_fallback=state.calls_fallback,
        error=state.error,
        note="; ".join(filter(None, (state.note, *_why_alone(state, block)))) if fused else state.note,
    )


def _why_alone(state: LayerState, block: MLPState | None) -> tuple[str, str]:
    """Why a fused layer is not in a larger region, or was not at a time."""
    mlp = f"mlp one by one: {block.last_reason}" if block is not None and block.last_reason else ""
    return mlp, state.siblings.ended if state.siblings else ""


def _region(layer: Any, state: LayerState, block: MLPState | None) -> str:
    if block is not None and block.runs:
        return "mlp"
    group = state.siblings.group_of(state.place) if state.siblings else ()
    return f"group {', '.join(group)}" if group else layer.kind.region


def _backend_of(layer: Any, state: LayerState) -> str:
    """The backend asked for; "auto" by what it came to, after a call: asking before could compile kernels."""
    if state.backend != "auto" or not state.calls_fused:
        return state.backend
    (shrink,) = [op for op in all_ops() if op.name == "lora_shrink"]  # every fused layer runs it
    try:
        return shrink.choose(problem_of(layer.base_layer.weight.device, probe_dtype(layer))).name
    except BackendError:  # requested from outside, for a model that has since been moved or cast
        return state.backend
