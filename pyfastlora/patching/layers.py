"""The classes a patched LoRA layer has: its exact PEFT class plus one forward.

`apply.py` swaps `module.__class__`, so the object, its parameters and its state_dict keys stay what they
were, and pickle and deepcopy find the class by its name. The classes of quantised layers are in
`layers_4bit.py` and `layers_8bit.py`, which need bitsandbytes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyfastlora.fused.projection import Projection
from pyfastlora.fused.projections import fused_projections
from pyfastlora.ops._registry import backend
from pyfastlora.patching.conditions import PLAIN, Kind
from pyfastlora.patching.groups import Siblings
from pyfastlora.patching.read import read

#: The attribute of a patched module that holds its LayerState: in `__dict__`, so it is no state_dict key.
STATE = "_fastlora"


@dataclass(slots=True)
class LayerState:
    """What is remembered of one patched layer, for its calls and for the report."""

    backend: str = "auto"
    calls_fused: int = 0
    calls_fallback: int = 0
    last_reason: str = ""
    refused: str = ""  # why verification left the layer on PEFT
    error: float | None = None
    note: str = ""
    siblings: Siblings | None = None
    place: int = 0  # among them

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        return replace(self, siblings=None)  # a copy's siblings are not these; patching the copy finds them

    def __reduce__(self) -> Any:
        return LayerState, tuple(getattr(replace(self, siblings=None), field.name) for field in fields(self))


class FusedForward(nn.Module):
    """Runs the fused projection where every condition holds, and else PEFT's own forward, unchanged."""

    #: The PEFT class that `unpatch` gives back.
    peft_class: ClassVar[type[nn.Module]]
    kind: ClassVar[Kind]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: LayerState = self.__dict__[STATE]
        self.prepare(self.__dict__["_modules"]["base_layer"], x)
        found: Any = read(self.kind, self, x, args, kwargs)
        siblings = self._siblings(state)
        if siblings is not None and (kept := siblings.enter(state.place, x, found)) is not None:
            count(state)
            return kept
        if isinstance(found, str):
            count(state, found)
            y = super().forward(x, *args, **kwargs)  # PEFT's: the next class in the order of resolution
        else:
            y = self._run(state, siblings, x, found)
            count(state)
        if siblings is not None:
            siblings.leave(x, None if isinstance(found, str) else y)
        return y

    def _get_name(self) -> str:
        return self.peft_class.__name__  # PEFT's layer status takes a layer's type from its repr

    @classmethod
    def prepare(cls, base: Any, x: Tensor) -> None:
        """What the base layer's own forward would do to it first."""

    def _run(self, state: LayerState, siblings: Siblings | None, x: Tensor, projection: Any) -> Tensor:
        """This layer's output; with its group's, if it leads one and all of them can run fused."""
        group = siblings.led_by(state.place, x) if siblings is not None else ()
        if siblings is None or not group:
            return self.run_fused(x, projection)
        projections = [projection]
        for i in group[1:]:
            member: Any = siblings.members[i]()
            if not isinstance(member, FusedForward) or member.__dict__[STATE].backend != state.backend:
                return self.run_fused(x, projection)
            member.prepare(member.__dict__["_modules"]["base_layer"], x)
            found = read(member.kind, member, x)
            if not isinstance(found, Projection):
                return self.run_fused(x, projection)
            projections.append(found)
        with by_backend(state.backend):
            y, *others = fused_projections(x, projections)
        siblings.keep(x, group[1:], projections[1:], others)
        return y

    def _siblings(self, state: LayerState) -> Siblings | None:
        """None also for a replica of DataParallel, which shares the state of the module it was made from."""
        siblings = state.siblings
        return siblings if siblings is not None and siblings.members[state.place]() is self else None

    def run_fused(self, x: Tensor, found: Any) -> Tensor:
        """The fused result of what `read` found, by the backend that `patch` was given."""
        with by_backend(self.__dict__[STATE].backend):
            return fused_projections(x, [found])[0]


def by_backend(spec: str) -> contextlib.AbstractContextManager[None]:
    """The backend that `patch` was given, in force; "auto" leaves what is."""
    return contextlib.nullcontext() if spec == "auto" else backend(spec)


def count(state: Any, reason: str = "") -> None:
    """Note a call that ran fused or, with a reason, did not."""
    if torch.compiler.is_compiling():
        return
    if reason:
        state.calls_fallback += 1
        state.last_reason = reason
    else:
        state.calls_fused += 1


class FastLoraLinear(FusedForward, Linear):
    """`peft.tuners.lora.layer.Linear` over a dense `nn.Linear`, or over GPT-2's `Conv1D`."""

    peft_class = Linear
    kind = Kind(bases=(nn.Linear, Conv1D), weights=PLAIN, packed=0)


def reader_of(module: nn.Module | None) -> type[FusedForward] | None:
    """Whose `kind` and `prepare` a linear is read with: a patched layer's own class, and for a bare linear,
    exactly as torch or bitsandbytes has it, the class of those with an adapter.
    """
    if isinstance(module, FusedForward):
        return type(module)
    if type(module) is nn.Linear:
        return FastLoraLinear
    if type(module).__module__ != "bitsandbytes.nn.modules":
        return None
    from pyfastlora.patching.layers_4bit import FastLoraLinear4bit
    from pyfastlora.patching.layers_8bit import FastLoraLinear8bitLt

    fast: tuple[type[FusedForward], ...] = (FastLoraLinear4bit, FastLoraLinear8bitLt)
    return next((each for each in fast if type(module) in each.kind.bases), None)
