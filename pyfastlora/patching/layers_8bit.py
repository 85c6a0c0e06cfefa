"""The class of a patched 8-bit LoRA layer. Importing this needs bitsandbytes."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Int8Params, Linear8bitLt
from peft.tuners.lora import bnb
from torch import Tensor, nn

from pyfastlora.patching.conditions import Kind
from pyfastlora.patching.layers import FusedForward


class FastLoraLinear8bitLt(FusedForward, bnb.Linear8bitLt):
    """`peft.tuners.lora.bnb.Linear8bitLt` over bitsandbytes' LLM.int8 linear."""

    peft_class = bnb.Linear8bitLt
    # pickle makes a plain Parameter of an Int8Params, which bitsandbytes reads just as well
    kind = Kind((Linear8bitLt,), weights=(Int8Params, nn.Parameter), packed=8)

    @classmethod
    def prepare(cls, base: Any, x: Tensor) -> None:
        if type(base) not in cls.kind.bases:
            return
        # What bitsandbytes' forward does to itself and a user can read
        base.state.is_training = base.training
        if getattr(base.weight, "CB", None) is not None:
            scales = base.state.SCB
            base.init_8bit_state()
            if base.state.SCB is None:  # PEFT's DoRA leaves a weight on a CPU without the scales it had
                base.state.SCB = scales
        bias = base.bias
        if bias is not None and bias.dtype != x.dtype:
            bias.data = bias.data.to(x.dtype)
