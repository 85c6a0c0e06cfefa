"""Shapes, inputs and variants that the benchmarks of the ops share.

A variant is one way to do the op: an implementation of ours by its name ("cpu", "reference"), somebody
else's code, or a floor ("memcpy", "dense"), which does less than the op and bounds what can be reached.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfastlora.ops import DropoutMask, Packed4bit, all_ops, dropout_mask
from pyfastlora.ops.dequant_4bit import code

# Set on a pytest config by `bench.ops`: takes rows as they are measured, by the device's stopwatch.
TAKE_ROW = pytest.StashKey[Callable[[dict[str, Any]], None]]()
DEVICE = torch.device(os.environ.get("FASTLORA_BENCH_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
# W [O, I] and x [T, I] of the linears of 1B and 8B models; on a GPU, where tensors below 10 MB measure
# launches, of 8B and 70B. PAIRS: of x and of a factor; adapters are float32 under autocast, or have the
# base's dtype. LIMITS: elements of W above which a variant takes seconds a call; references copy it to int64.
if ON_GPU:
    WEIGHTS = [(4096, 4096), (14336, 4096), (28672, 8192)]
    ACTIVATIONS = [(512, 4096), (8192, 4096), (8192, 14336)]
    DTYPES, PAIRS = [BF16], [(BF16, BF16), (BF16, FP32)]
    THREADS = [torch.get_num_threads()]
    LIMITS = {"reference": 4096 * 4096}
else:
    WEIGHTS = [(2048, 2048), (4096, 4096), (4096, 14336)]
    ACTIVATIONS = [(512, 2048), (512, 4096), (512, 14336)]
    DTYPES, PAIRS = [BF16, FP32], [(BF16, BF16), (BF16, FP32), (FP32, FP32)]
    THREADS = sorted({1, torch.get_num_threads()})
    LIMITS = {"reference": 2048 * 2048, "PEFT": 4096 * 4096}
RANK = 16


def short(value: object) -> str:
    """Ids of parameters: "bf16", "4096x14336"."""
    if isinstance(value, torch.dtype):
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[value]
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def skip_slow(variant: str, shape: tuple[int, int]) -> None:
    """Leave out what would take longer than the rest of the file."""
    if math.prod(shape) > LIMITS.get(variant, math.inf):
        pytest.skip(f"`{variant}` on {short(shape)} takes seconds a call")


def ours(op: str) -> list[str]:
    """The names of an op's implementations, best first."""
    (found,) = [each for each in all_ops() if each.name == op]
    return [implementation.name for implementation in found.implementations]


#: S and its factor in x's 16-bit dtype, which fused layers have on a GPU where PEFT rounds S as well.
ROUNDED = ["ours, 16-bit S"] if ON_GPU else []


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed values on `DEVICE`, the same for a seed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def mask_for(x: Tensor, p: float = 0.1) -> DropoutMask:
    """A dropout mask of x's shape."""
    return dropout_mask(x, p)


@functools.lru_cache(maxsize=2)
def nf4(shape: tuple[int, int], dtype: torch.dtype, blocksize: int = 64) -> Packed4bit:
    """A double-quantised NF4 weight of random nibbles and scales, as QLoRA stores it."""
    here: Any = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    count = shape[0] * shape[1]
    blocks = count // blocksize
    return Packed4bit(
        torch.randint(256, (count // 2,), dtype=torch.uint8, **here),
        torch.randint(256, (blocks,), dtype=torch.uint8, **here),
        shape,
        dtype,
        blocksize,
        "nf4",
        nested_code=torch.rand(256, **here).sort().values,
        nested_absmax=torch.rand(-(-blocks // 256), **here) * 0.05,
        nested_offset=torch.tensor([0.05], device=DEVICE),
    )


def stored_bytes(w: Packed4bit) -> int:
    """Of the packed weight with all its scales."""
    parts = (w.packed, w.absmax, w.nested_code, w.nested_absmax, w.nested_offset)
    return sum(part.nbytes for part in parts if part is not None)


def bnb_state(w: Packed4bit) -> Any:
    """bitsandbytes' QuantState of the same weight, around the same tensors."""
    from bitsandbytes.functional import QuantState

    device = w.packed.device
    nested = QuantState(
        absmax=w.nested_absmax, code=w.nested_code, blocksize=w.nested_blocksize, dtype=torch.float32
    )
    assert w.nested_offset is not None
    return QuantState(
        absmax=w.absmax,
        shape=torch.Size(w.shape),
        code=code(w.quant_type, device),
        blocksize=w.blocksize,
        quant_type=w.quant_type,
        dtype=w.dtype,
        offset=w.nested_offset[0],
        state2=nested,
    )
