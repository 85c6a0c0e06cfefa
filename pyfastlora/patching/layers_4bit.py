"""The class of a patched 4-bit LoRA layer. Importing this needs bitsandbytes."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from peft.tuners.lora import bnb
from torch import Tensor

from pyfastlora.patching import cpu_repack
from pyfastlora.patching.conditions import PLAIN, Kind
from pyfastlora.patching.layers import FusedForward


class FastLoraLinear4bit(FusedForward, bnb.Linear4bit):
    """`peft.tuners.lora.bnb.Linear4bit` over bitsandbytes' NF4 or FP4 linear."""

    peft_class = bnb.Linear4bit
    # pickle and FSDP make a plain tensor of a Params4bit, which bitsandbytes reads just as well
    kind = Kind((Linear4bit, LinearNF4, LinearFP4), weights=(Params4bit, *PLAIN), packed=4)

    @classmethod
    def prepare(cls, base: Any, x: Tensor) -> None:
        if type(base) not in cls.kind.bases:
            return
        if cpu_repack.is_repacked(base):
            cpu_repack.undo(base)
        # What bitsandbytes' forward leaves behind and a user can read: the compute dtype taken from the
        # first x, and the bias recast to it
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        bias = base.bias
        if bias is not None and bias.dtype != (base.compute_dtype or x.dtype):
            bias.data = bias.data.to(base.compute_dtype or x.dtype)
