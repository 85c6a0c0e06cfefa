"""Which number formats a run uses, from bf16, fp16 and the machine.

bf16: true    base in bfloat16, adapter in float32, matrix products under autocast to bfloat16
bf16: full    base and adapter in bfloat16, no autocast
fp16: true    like bf16: true with float16 and a loss scaler; needs a GPU
otherwise     float32 throughout

Without an adapter the whole model is trained, in float32 where a base would be frozen in 16 bits beside one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError


@dataclass(frozen=True)
class Precision:
    """dtypes of frozen weights, of matrix products (None: as stored) and of the adapter."""

    base: torch.dtype
    autocast: torch.dtype | None
    adapter: torch.dtype

    def cast(self, device: torch.device) -> torch.autocast:
        """The context of matrix products on device."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def __str__(self) -> str:
        name = {None: "none", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        return f"base {name[self.base]}, adapter {name[self.adapter]}, autocast {name[self.autocast]}"


def device_of_run(local_rank: int = 0) -> torch.device:
    """The GPU of this process, or the CPU. Raises UserError where there are more processes than GPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start as many processes as there are GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32 ones there.

    On a CPU they need instructions for it (AVX512-BF16, AMX, or bf16 on Arm): emulated, they are slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(config: Config, device: torch.device) -> Precision:
    """The formats of a run on device. Raises UserError for float16 on a CPU."""
    if config.fp16:
        if device.type == "cpu":
            raise UserError("fp16: true needs a GPU, and torch sees none here; set bf16: auto instead")
        return Precision(_frozen(config, torch.float16), torch.float16, torch.float32)
    if config.bf16 == "full":
        return Precision(torch.bfloat16, None, torch.bfloat16)
    if config.bf16 is True or (config.bf16 == "auto" and has_fast_bf16(device)):
        return Precision(_frozen(config, torch.bfloat16), torch.bfloat16, torch.float32)
    return Precision(torch.float32, None, torch.float32)


def _frozen(config: Config, dtype: torch.dtype) -> torch.dtype:
    """dtype, unless the base is trained: a step of the optimizer is often too small for its 8 bits or 11."""
    return torch.float32 if config.adapter is None else dtype
