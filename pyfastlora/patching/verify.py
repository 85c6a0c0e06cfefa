"""A small random batch through a fused layer and through its PEFT forward: how far apart are they?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyfastlora.fused.projections import fused_projections
from pyfastlora.patching.conditions import Kind
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
        projection = read(layer.kind, layer, x)
        if isinstance(projection, str):
            return Outcome(None, note=f"not verified: {projection}")
        ours = _run(lambda: layer.run_fused(x, projection), x, parameters, dy)
        theirs = _run(lambda: layer.peft_class.forward(layer, x), x, parameters, dy)
    errors = {name: _difference(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    bound = max(BOUNDS[tensor.dtype] for tensor in (x, *parameters.values()))
    note = "" if _adapter_acts(layer) else "the adapter is still zero (B = 0)"
    if errors[worst] <= bound:
        return Outcome(errors[worst], note)
    if misread_by_bitsandbytes(layer):
        columns, blocksize = layer.base_layer.in_features, layer.base_layer.weight.quant_state.blocksize
        return Outcome(
            errors[worst], f"PEFT is off: bitsandbytes misreads {columns} columns in blocks of {blocksize}"
        )
    return Outcome(errors[worst], note, f"verify: {worst} is {errors[worst]:.1e} off PEFT, above {bound:.0e}")


def run_once(kind: Kind, layer: nn.Module) -> bool:
    """One fused forward and backward, for what they may raise; False if a condition rules the layer out."""
    if standing_reason(kind, layer):
        return False
    with _undisturbed(layer) as (x, dy):
        projection = read(kind, layer, x)
        if isinstance(projection, str):
            return False
        _run(lambda: fused_projections(x, [projection])[0], x, trainable(kind, layer), dy)
    return True


def probe_dtype(layer: Any) -> torch.dtype:
    """The dtype of input that the base layer computes in when autocast is off."""
    state = getattr(layer.base_layer.weight, "quant_state", None)
    return layer.base_layer.weight.dtype if state is None else layer.base_layer.compute_dtype or state.dtype


@contextmanager
def _undisturbed(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """A random x and dy for the layer, in a context that leaves generators and modes as they are."""
    base, device, dtype = layer.base_layer, layer.base_layer.weight.device, probe_dtype(layer)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(0)
        x = torch.randn(_ROWS, base.in_features, device=device, dtype=dtype).requires_grad_()
        yield x, torch.randn(_ROWS, base.out_features, device=device, dtype=dtype)


def misread_by_bitsandbytes(layer: Any) -> bool:
    """Whether bitsandbytes 0.50 dequantises the base weight of a patched layer wrongly, on this device.

    Its AVX-512 kernel takes K // blocksize scales per row, too few where blocks run across the ends of
    rows. It is used when K is a multiple of 16; other sizes take a correct scalar loop.
    """
    base = layer.base_layer
    if not layer.kind.packed or base.weight.device.type != "cpu":
        return False
    return base.in_features % base.weight.quant_state.blocksize != 0 and base.in_features % 16 == 0


def _run(
    forward: Callable[[], Tensor], x: Tensor, parameters: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the same dropout mask on both sides
    y = forward()
    names = ["the output", "the gradient of x", *(f"the gradient of {name}" for name in parameters)]
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy.to(y.dtype))
    return dict(zip(names, (y.detach(), *gradients), strict=True))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    distance, size = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
    if distance == 0:
        return 0.0
    return distance / size if size > 0 and distance == distance else float("inf")


def _adapter_acts(layer: Any) -> bool:
    (adapter,) = [name for name in layer.active_adapters if name in layer.lora_B]
    return bool(layer.lora_B[adapter].weight.count_nonzero())
