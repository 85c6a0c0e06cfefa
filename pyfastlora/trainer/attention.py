"""What each attention of transformers needs, in one table, looked at before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.precision import Precision


@dataclass(frozen=True)
class Needs:
    """packages: modules to import (any of them); half: 16-bit matrix products; on_cpu: trains there."""

    packages: tuple[str, ...] = ()
    half: bool = False
    on_cpu: bool = False
    why_not_on_cpu: str = ""


ATTENTION = {
    "eager": Needs(on_cpu=True),
    "sdpa": Needs(on_cpu=True),
    "flash_attention_2": Needs(("flash_attn", "kernels"), half=True, why_not_on_cpu="has GPU kernels only"),
    "flash_attention_3": Needs(
        ("flash_attn_interface", "kernels"), half=True, why_not_on_cpu="has GPU kernels only"
    ),
    "flex_attention": Needs(why_not_on_cpu="has no backward pass on a CPU"),
}


def check_attention(config: Config, device: torch.device, precision: Precision) -> None:
    """Raises UserError where attn_implementation cannot be trained with here."""
    name = config.attn_implementation
    if name is None:
        return
    needs = ATTENTION[name]
    if device.type == "cpu" and not needs.on_cpu:
        raise UserError(f"attn_implementation: {name} {needs.why_not_on_cpu}; say sdpa")
    if needs.packages and not any(importlib.util.find_spec(package) for package in needs.packages):
        wanted = " or ".join(needs.packages)
        raise UserError(f"attn_implementation: {name} needs the package {wanted}, which is not installed")
    computes = precision.autocast or precision.base
    if needs.half and computes == torch.float32:
        raise UserError(f"attn_implementation: {name} computes in 16 bits; set bf16: true")
