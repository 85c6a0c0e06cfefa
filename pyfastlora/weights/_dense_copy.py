"""Dense copies of 4-bit weights, for the products of a GPU: made once per use, in reused memory, with room.

    copy[:O, :I] is W;  copy[:O, I:] and copy[O:, :I] are for an adapter's factors (fused/extension.py)

A use is a forward or a backward product. Where a checkpointed forward runs again inside a backward pass, its
copy is kept for the gradient that comes next: that saves one of three dequantisations, 144 us for a layer of
an 8B model on an H200 by the cost model, for the 0.44 GB of one layer.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from pyfastlora.ops import Packed4bit, dequant_4bit
from pyfastlora.ops._arena import scratch
from pyfastlora.weights import ROOM

# Devices whose products go through dense copies. A CPU multiplies in panels that stay in its caches.
GPUS = {"cuda"}


class Kept(dict[tuple[int, torch.dtype, torch.dtype], tuple[Tensor, Tensor]]):
    """(address of the codes, dtype, rounding) -> (the codes, kept alive, and the copy), of a backward
    pass.
    """


_last: weakref.ref[Kept] | None = None


def dense_copy(w: Packed4bit, dtype: torch.dtype, values: torch.dtype, *, gradient: bool) -> Tensor:
    """W, rounded to `values` and then to `dtype`, in the corner of [O + ROOM, I + ROOM]; the rest is
    undefined.

    `gradient` says which product it is for. Valid until this thread asks again.
    """
    (rows, cols), device = w.shape, w.packed.device
    shape = (rows + ROOM, cols + ROOM)
    if not _in_backward():
        if not torch.compiler.is_compiling():
            _forget()
        return _fill(scratch(shape, dtype, device), w, values)
    key = (w.packed.data_ptr(), dtype, values)
    if gradient:
        found = kept().pop(key, None)
        return found[1] if found else _fill(scratch(shape, dtype, device), w, values)
    copy = _fill(torch.empty(shape, dtype=dtype, device=device), w, values)
    _keep(key, (w.packed, copy))
    return copy


def kept() -> Kept:
    """What the backward pass that runs has kept so far; nothing where none runs."""
    found = _last() if _last else None
    return Kept() if found is None else found


def _forget() -> None:
    """Drop what a backward pass left that raised: on a GPU its thread holds the pass until it has another."""
    global _last
    if _last is not None and (found := _last()) is not None:
        found.clear()
    _last = None


def _keep(key: tuple[int, torch.dtype, torch.dtype], copy: tuple[Tensor, Tensor]) -> None:
    global _last
    found = _last() if _last else None
    if found is None:
        found = Kept()
        # The pass owns it, through its list of callbacks: it goes with the pass, also with one that raises.
        torch.autograd.Variable._execution_engine.queue_callback(found.clear)
        _last = weakref.ref(found)
    found[key] = copy


def _fill(copy: Tensor, w: Packed4bit, values: torch.dtype) -> Tensor:
    corner = copy[: w.shape[0], : w.shape[1]]
    if values == copy.dtype:
        dequant_4bit(w, out=corner)
    else:
        corner.copy_(dequant_4bit(w, values))
    return copy


def _in_backward() -> bool:
    # torch.compile plans its own memory, and traces neither addresses nor callbacks.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
