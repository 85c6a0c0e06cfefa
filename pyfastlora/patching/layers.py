"""The classes a patched LoRA layer has: its exact PEFT class plus one forward.

`apply.py` swaps `module.__class__`, so the object, its parameters and its state_dict keys stay what they
were, and pickle and deepcopy find the class by its name. The class of 4-bit layers is in `layers_4bit.py`,
which needs bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from pyfastlora.fused.projections import Projection, fused_projections
from pyfastlora.ops._registry import backend
from pyfastlora.patching.conditions import PLAIN, Kind
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


class FusedForward(nn.Module):
    """Runs the fused projection where every condition holds, and else PEFT's own forward, unchanged."""

    #: The PEFT class that `unpatch` gives back.
    peft_class: ClassVar[type[nn.Module]]
    kind: ClassVar[Kind]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = read(self.kind, self, x, args, kwargs)
        if isinstance(found, str):
            if not torch.compiler.is_compiling():
                state: LayerState = self.__dict__[STATE]
                state.calls_fallback += 1
                state.last_reason = found
            return super().forward(x, *args, **kwargs)  # PEFT's: the next class in the order of resolution
        y = self.run_fused(x, found)
        if not torch.compiler.is_compiling():
            self.__dict__[STATE].calls_fused += 1
        return y

    def run_fused(self, x: Tensor, projection: Projection) -> Tensor:
        """The fused result, by the backend that `patch` was given."""
        spec = self.__dict__[STATE].backend
        if spec == "auto":
            return fused_projections(x, [projection])[0]
        with backend(spec):
            return fused_projections(x, [projection])[0]


class FastLoraLinear(FusedForward, Linear):
    """`peft.tuners.lora.layer.Linear` over a dense `nn.Linear`."""

    peft_class = Linear
    kind = Kind(bases=(nn.Linear,), weights=PLAIN, packed=False)
