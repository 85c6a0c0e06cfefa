"""dropout_mask: the elements torch's dropout would keep, one bit each, from the same generator.

`mask(x, p)` draws exactly what `torch.nn.functional.dropout(x, p, training=True)` would draw and leaves the
generator in the same state, so a model gives the same numbers with and without this library. Kept as bits, a
mask costs 1/16 of a bfloat16 activation; torch keeps it in the activation's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyfastlora.ops._registry import Implementation, Op, always, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import rows_of
from pyfastlora.ops._triton import triton_implementation


@dataclass(frozen=True, slots=True)
class DropoutMask:
    """bits uint8 [T, 2 ceil(C / 16)]: bit k % 8 of byte k / 8 keeps element k of a row.

    scale is 1 / (1 - p), which kept elements are multiplied by.
    """

    bits: Tensor
    scale: float

    def unpack(self, cols: int, dtype: torch.dtype) -> Tensor:
        """The mask as a [T, cols] tensor of 0 and `scale`."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flags = ((self.bits[:, :, None] >> shifts) & 1).flatten(1)[:, :cols]
        return flags.to(dtype) * self.scale


def dropout_mask(x: Tensor, p: float, dtype: torch.dtype | None = None) -> DropoutMask:
    """The mask of dropout with probability `p` on x [..., C], or on x cast to `dtype`, as rows.

    Raises ValueError unless 0 <= p < 1. Source: aten/src/ATen/native/Dropout.cpp (one bernoulli draw over x's
    memory).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout_mask: p must be in [0, 1); got {p}")
    if dtype not in (None, x.dtype) and x.device.type != "cpu":
        # There the order of the draws goes by the width of an element; its value does not matter.
        x = torch.empty_like(x, dtype=dtype)
    return DropoutMask(OP.pick(x, torch.float32)(x, 1 - p), 1 / (1 - p))


def pack(keep: Tensor) -> Tensor:
    """Bits of a bool [T, C], rows padded to 16 bits."""
    rows, cols = keep.shape
    padded = torch.zeros(rows, (cols + 15) // 16 * 16, dtype=torch.uint8, device=keep.device)
    padded[:, :cols] = keep
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=keep.device)
    return (padded.view(rows, padded.shape[1] // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def draw(x: Tensor, keep: float) -> Tensor:
    """What torch's dropout would keep of x, as rows [T, C] of its own flags."""
    if x.device.type in ("cuda", "xpu"):  # there dropout is one kernel with an order of its own
        drawn = torch.native_dropout(x, 1 - keep, True)[1]
    else:
        drawn = torch.empty_like(x, dtype=torch.bool if x.device.type == "cpu" else x.dtype).bernoulli_(keep)
    return drawn.reshape(-1, x.shape[-1])


def reference(x: Tensor, keep: float) -> Tensor:
    return pack(draw(x, keep).to(torch.bool))


def gpu(x: Tensor, keep: float) -> Tensor:
    return _pack_native(rows_of(draw(x, keep)))


def triton(x: Tensor, keep: float) -> Tensor:
    return _pack.run(rows_of(draw(x, keep)))


def cpu(x: Tensor, keep: float) -> Tensor:
    # torch draws in the order of memory, which is the order of rows in the packed layout only.
    if not x.is_contiguous() or torch.compiler.is_compiling():
        return _pack_native(rows_of(draw(x, keep)))
    cols = x.shape[-1]
    rows = x.numel() // cols if cols else 0
    bits = torch.empty(rows, (cols + 15) // 16 * 2, dtype=torch.uint8)
    state = torch.get_rng_state()
    torch.ops.pyfastlora.dropout_mask.default(state, keep, rows, cols, bits)
    torch.set_rng_state(state)
    return bits


def _pack_native(keep: Tensor) -> Tensor:
    rows, cols = keep.shape
    bits = torch.empty(rows, (cols + 15) // 16 * 2, dtype=torch.uint8, device=keep.device)
    torch.ops.pyfastlora.dropout_pack.default(keep, bits)
    return bits


_pack = triton_implementation("dropout_mask", "pack")

OP = Op(
    "dropout_mask",
    Implementation("gpu", gpu, why_not_gpu),
    Implementation("triton", triton, _pack.why_not),
    Implementation("cpu", cpu, why_not_cpu),
    Implementation("reference", reference, always),
)
