"""Sums that programs share: each writes its part, and a second launch adds the parts in a fixed order.

Atomics would save that launch and give another rounding in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def parts(blocks: int, steps: int, programs: int) -> int:
    """How many parts to cut sums of `steps` steps into, where `blocks` programs leave the chip idle."""
    return max(1, min(programs // blocks, steps // 4))


def buffer(out: Tensor, count: int) -> Tensor:
    """Where `count` parts of `out` are written: `out` itself, if there is one part."""
    return out if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)


def add(partial: Tensor, out: Tensor) -> None:
    """out = the sum of the parts, in out's dtype; nothing to do where the buffer is `out`."""
    if partial is not out:
        count, cols = out.numel(), out.shape[-1]
        pitch = out.stride(-2) if out.dim() > 1 else cols
        grid = (triton.cdiv(count, BLOCK),)
        _add_kernel[grid](partial, out, count, cols, pitch, partial.shape[0], BLOCK=BLOCK)


@triton.jit
def _add_kernel(partial, out, count, cols, out_pitch, parts, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(partial + at, inside, 0.0)
        partial += count
    tl.store(out + at // cols * out_pitch + at % cols, total.to(out.dtype.element_ty), inside)
