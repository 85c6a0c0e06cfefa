"""4-bit codes to float32, for the kernels that read packed weights.

    value[i] = code[nibble[i]] * absmax[i // blocksize]        the even element of a byte in its high nibble
    absmax[b] = nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset   when nested

A run is as many consecutive elements as share one look-up of their scale: 8, four bytes, where rows and
blocks begin on a multiple of it, else 1. Kernels that decode are launched without fused multiply-adds:
bitsandbytes rounds the nested product before it adds the offset.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Dettmers et al. 2023, appendix E; and sign, two exponent bits, one mantissa bit, over the largest magnitude.
NF4 = tl.constexpr(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = tl.constexpr((*_FP4, *(-value for value in _FP4)))


@triton.jit
def code_of(FOUR_BIT_FLOAT: tl.constexpr):
    """The 16 values of FP4 or NF4."""
    index = tl.arange(0, 16)
    values = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        values = tl.where(index == i, FP4[i] if FOUR_BIT_FLOAT else NF4[i], values)
    return values


@triton.jit
def decode(
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    code,
    first,
    inside,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    RUN: tl.constexpr,
):
    """float32 [.., RUN]: the runs that begin at elements `first`, int64 [..]; zeros where not `inside`."""
    first = first.to(tl.uint64)  # divided by powers of two, mostly: signed, each costs two instructions more
    block = first // BLOCKSIZE
    scale = tl.load(absmax + block, inside, 0)
    if nested_code is not None:
        scale = tl.load(nested_code + scale.to(tl.int32), inside, 0.0)
        scale = scale * tl.load(nested_absmax + block // NESTED_BLOCKSIZE, inside, 0.0)
        scale = tl.where(inside, scale + tl.load(nested_offset), 0.0)
    if RUN == 8:
        words = tl.load(packed.to(tl.pointer_type(tl.uint32)) + first // 8, inside, 0)
        element = tl.arange(0, 8)
        nibbles = tl.expand_dims(words, -1) >> ((4 * element) ^ 4).to(tl.uint32)  # the high nibble first
    else:
        byte = tl.load(packed + first // 2, inside, 0)
        nibbles = tl.expand_dims(tl.where(first % 2 == 0, byte >> 4, byte), -1)
    index = (nibbles & 15).to(tl.int32)
    values = tl.gather(code, tl.reshape(index, [index.numel]), 0)
    return tl.reshape(values, index.shape) * tl.expand_dims(scale, -1)


# ---- arguments ----

# What decoded values are rounded to, as a kernel's constant.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tensors(w: Any) -> tuple[Tensor | None, ...]:
    """The pointers of a Packed4bit, in the order of `decode`."""
    return (w.packed, w.absmax, w.nested_code, w.nested_absmax, w.nested_offset)


def constants(w: Any, col: int = 0) -> dict[str, Any]:
    """The constants of a kernel that decodes rows of a Packed4bit from column `col` on."""
    whole = all(size % 8 == 0 for size in (w.shape[1], col, w.blocksize))
    aligned = whole and w.packed.data_ptr() % 4 == 0
    return {
        "FOUR_BIT_FLOAT": w.quant_type == "fp4",
        "BLOCKSIZE": w.blocksize,
        "NESTED_BLOCKSIZE": w.nested_blocksize,
        "RUN": 8 if aligned else 1,
        "enable_fp_fusion": False,
    }
