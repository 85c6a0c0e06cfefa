"""Memory: which tensors are alive together, what the allocator gave out, and what the machine has."""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Bytes of the storages that are alive, in all and by kind, at any time and at their peak.

    kind_of names the kind of a tensor that an operation has made.
    """

    def __init__(self, kind_of: Callable[[Tensor], str]) -> None:
        super().__init__()
        self._kind_of = kind_of
        self._seen: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # by address: bytes and kind
        self.bytes = 0
        self.by_kind: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._add(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and not any(isinstance(t, FakeTensor) for t in args):
            with _disable_current_modes():  # states of generators are real even where nothing else is
                return func(*args, **kwargs)
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            # without values torch knows bfloat16 alone; copies made here are not seen
            narrow = [t.to(torch.bfloat16) for t in args[:2]]
            result = func(*narrow, *args[2:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, None)
        return result

    def call_it(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor among another kind from now on."""
        key = id(tensor.untyped_storage())
        size, before = self._seen[key][1:]
        self._move(-size, before)
        self._seen[key] = (self._seen[key][0], size, kind)
        self._move(size, kind)

    def _add(self, tensor: Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch gives a storage one Python object for as long as it lives
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            _, size, kind = self._seen.pop(key)
            self._move(-size, kind)

        size, kind = storage.nbytes(), kind or self._kind_of(tensor)
        self._seen[key] = (weakref.ref(storage, gone), size, kind)
        self._move(size, kind)
        if self.bytes > self.peak:
            self.peak, self.at_peak = self.bytes, dict(self.by_kind)

    def _move(self, size: int, kind: str) -> None:
        self.bytes += size
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size


class Meter:
    """The most memory that tensors of a run take on its device.

    On a GPU the allocator's own number. On a CPU it is counted, which makes a step some times slower: in the
    steps whose batch is larger than all before, a few of a run; an optimizer's step is not looked into. Where
    an engine divides parameters, or torch.compile runs them, nothing is counted.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._largest = self._most = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def watching(self, values: int) -> Iterator[None]:
        """Around a forward and backward pass of a batch of so many values."""
        if self._device.type == "cuda" or values <= self._largest or not self._can_count():
            yield
            return
        from pyfastlora.patching.conditions import memory_counted

        self._largest = values
        counter = Counter(lambda tensor: "made")
        counter.add(held_by(self._model), "held")
        held = counter.bytes
        counter.add((p.grad for p in self._model.parameters() if p.grad is not None), "made")
        with memory_counted(), counter:
            yield
        self._most = max(self._most, counter.peak - held)

    def peak(self, optimizer: torch.optim.Optimizer | None) -> int | None:
        """Bytes so far, the states of the optimizer with them; None where nothing was counted."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._most:
            return None
        kept = [] if optimizer is None else tree_leaves(dict(optimizer.state))
        states = [value for value in kept if isinstance(value, Tensor)]
        return self._most + storage_bytes([*held_by(self._model), *states])

    def _can_count(self) -> bool:
        divided = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self._model.parameters())
        return not divided and not any(hasattr(m, "_orig_mod") for m in self._model.modules())


def held_by(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and the scales of quantised weights."""
    yield from model.buffers()
    for p in model.parameters():
        yield p
        state = getattr(p, "quant_state", None)
        for part in (state, getattr(state, "state2", None), p):
            scales = (getattr(part, name, None) for name in ("absmax", "code", "offset", "SCB"))
            yield from (t for t in scales if isinstance(t, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of tensors, each counted once."""
    storages = (plain.untyped_storage() for t in tensors for plain in _plain(t))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors that one of a subclass is made of, such as torchao's optimizer states."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had nothing left: of a GPU, of torch's on a CPU, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Bytes now and at their peak: what torch holds of a GPU; on a CPU, all that this process does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def memory_of(device: torch.device) -> int:
    """Bytes: of the GPU, all; of the machine or this process' control group, what is free to be used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    free = [_available()]
    for limit, used in _CGROUPS:
        with suppress(OSError, ValueError):  # none, or "max"
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free))


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _available() -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
