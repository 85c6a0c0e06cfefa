"""Keeps bitsandbytes from repacking 4-bit weights on a CPU, and undoes it where it has happened.

On CPUs with AVX512-BF16 the first forward of `bnb.nn.Linear4bit` in eval mode rearranges the packed weight
in place for an inference kernel that has no backward (bitsandbytes 0.50). From then on training passes no
gradient through the layer, and `dequantize_4bit` of the weight, so DoRA and merging, gives garbage. `patch`
therefore switches the repacking off on every Linear4bit of the model, with or without an adapter: the
gradient of an adapted layer runs through the bare ones too.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_SWITCH = "support_avx512bf16_for_cpu"
_SAVED = "_fastlora_" + _SWITCH


def forbid(module: nn.Module) -> None:
    """Switch the repacking off if module is a bitsandbytes Linear4bit, and undo it if it has happened."""
    if _SWITCH not in module.__dict__:
        return
    module.__dict__.setdefault(_SAVED, module.__dict__[_SWITCH])
    module.__dict__[_SWITCH] = False
    if is_repacked(module):
        undo(module)


def allow(module: nn.Module) -> None:
    """Give module the switch back that `forbid` found."""
    if _SAVED in module.__dict__:
        module.__dict__[_SWITCH] = module.__dict__.pop(_SAVED)


def is_repacked(module: Any) -> bool:
    """Whether the weight of a bitsandbytes Linear4bit is in the layout of the CPU inference kernel."""
    state = getattr(module.weight, "quant_state", None)
    return state is not None and getattr(state, "packing_format_for_cpu", False)


@torch.inference_mode(False)  # an inference tensor in a parameter could not be trained through
@torch.no_grad()
def undo(module: Any) -> None:
    """Bring a repacked weight back to the layout it was quantised in; its 4-bit codes come back exactly.

    The block scales were rounded to bfloat16 by the repacking and stay so: within 2^-9 of what they were.
    Scales that were nested are quantised to 8 bits again, in float32 around their mean. (bitsandbytes' own
    inverse does that in the weight's dtype, and leaves scales that were not nested transposed.)
    """
    import bitsandbytes.functional as bnb

    state = module.weight.quant_state
    absmax = state.absmax.T.reshape(-1).float()
    nested, state.original_nested = (
        state.original_nested,
        False,
    )  # so that the inverse leaves the scales alone
    packed, _ = bnb._convert_weight_packed_for_cpu_inverse(module.weight.data.clone(), state)
    state.original_nested = nested
    state.absmax = absmax
    if nested:
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=256)
        state.nested = True
    module.weight.data = packed
    module.quant_state = state
    logger.warning(
        "bitsandbytes had repacked a 4-bit weight %s for CPU inference; undone, but its block scales keep "
        "the rounding to bfloat16",
        list(state.shape),
    )
