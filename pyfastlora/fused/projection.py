"""One adapted linear as a fused region sees it: its tensors, whether they fit, and the dtypes of PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastlora.fused.modes import autocast_dtype
from pyfastlora.weights import FrozenWeight

PER_PROJECTION = 5  # tensors that may take a gradient: Projection.parameters


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear of the region: the frozen weight W [O, I] and what PEFT adds to it.

    lora_A [r, I] and lora_B [O, r] come together or not at all. `dropout` is the probability in force for
    this call (0 in eval mode). `lora_bias` [O] is multiplied by `scaling`, as PEFT does; it does not go with
    DoRA's `magnitude` [O].
    """

    weight: FrozenWeight
    bias: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815  (PEFT's names)
    lora_B: Tensor | None = None  # noqa: N815
    lora_bias: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What may take a gradient."""
        return self.bias, self.lora_A, self.lora_B, self.lora_bias, self.magnitude

    def is_same(self, other: Projection) -> bool:
        """Whether `other` is made of the same tensors in the same way."""
        return (
            (self.scaling, self.dropout, self.weight.settings)
            == (other.scaling, other.dropout, other.weight.settings)
            and all(a is b for a, b in zip(self.parameters, other.parameters, strict=True))
            and _is_same_memory(self.weight.tensors[0], other.weight.tensors[0])
        )


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    # Packed weights are read through a new view each time; a graph that is traced has no addresses.
    return a is b or torch.compiler.is_compiling() or a.data_ptr() == b.data_ptr()


def check(op: str, name: str, shape: Sequence[int], p: Projection) -> None:
    """Raise ValueError unless p's tensors fit one another and an input called `name` of this shape."""
    outer, inner = p.weight.shape
    if not shape or shape[-1] != inner:
        raise ValueError(
            f"{op}: {name} must end in {inner} columns for W {[outer, inner]}; got {list(shape)}"
        )
    if (p.lora_A is None) != (p.lora_B is None):
        raise ValueError(f"{op}: lora_A and lora_B come together; one of them is missing")
    if p.lora_A is None or p.lora_B is None:
        if p.magnitude is not None or p.lora_bias is not None:
            raise ValueError(f"{op}: magnitude and lora_bias need lora_A and lora_B")
        return
    ranks = p.lora_A.shape[0]
    if tuple(p.lora_A.shape) != (ranks, inner) or tuple(p.lora_B.shape) != (outer, ranks):
        raise ValueError(
            f"{op}: lora_A [r, I] and lora_B [O, r] must fit W {[outer, inner]}; "
            f"got {list(p.lora_A.shape)} and {list(p.lora_B.shape)}"
        )
    if p.magnitude is not None and p.lora_bias is not None:
        raise ValueError(f"{op}: DoRA with a bias on lora_B is not a formula of PEFT's forward")


def output_dtype(x: Tensor, p: Projection) -> torch.dtype:
    """The dtype of the projection's output for x, under the autocast in force."""
    cast = autocast_dtype(x)
    return base_dtype(x, p, p.weight.compute_dtype(x, cast), cast)


def base_dtype(x: Tensor, p: Projection, compute: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    """The base layer's; over a quantised one, under CUDA's autocast, PEFT leaves the sum as it comes out."""
    dtype = p.weight.output_dtype(x, compute)
    if p.lora_A is None or _casts(x.device.type, p, cast) or cast is None:
        return dtype
    return torch.promote_types(dtype, cast if p.magnitude is None else p.magnitude.dtype)


def dropped_dtype(x: torch.dtype, device: str, p: Projection, cast: torch.dtype | None) -> torch.dtype:
    """Of what PEFT's dropout is given: a GPU draws another mask for another dtype."""
    return p.lora_A.dtype if p.lora_A is not None and _casts(device, p, cast) else x


def _casts(device: str, p: Projection, cast: torch.dtype | None) -> bool:
    """Whether PEFT's layer casts its input to the adapter's dtype, and its output to the base layer's: those
    for quantised weights do unless `torch.is_autocast_enabled()`, which asks CUDA's autocast alone.
    """
    return not (p.weight.is_quantised and device == "cuda" and cast is not None)
