"""Reused scratch memory for dequantised weights: one growing buffer per thread, device, stream and dtype.

A fresh 32 MB tensor costs 11 ms of page faults on a CPU, six times the dequantisation that fills it, and on a
GPU every weight of a model would ask the allocator for another size. A buffer is only valid until its thread
asks again on that stream: whoever takes it must have used it up before calling anything that may do so too.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised, packed tensor of `shape` in this thread's reused buffer.

    A fresh one where memory must not outlive the caller: in a captured CUDA graph, which replays into the
    addresses it has seen, and in a graph of torch.compile, which plans memory itself.
    """
    if torch.compiler.is_compiling() or _capturing(device):
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[Any, Tensor] = _local.__dict__
    count = math.prod(shape)
    # Two streams may run at the same time, and the buffer of one is not free when the other asks.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = buffers.get((device, dtype, stream))
    if buffer is None or buffer.numel() < count:
        # Outside inference mode even when it is on: a buffer born inside could not be written later.
        with torch.inference_mode(False):
            buffer = buffers[(device, dtype, stream)] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
