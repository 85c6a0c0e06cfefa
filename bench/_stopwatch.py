"""What a call takes on its device: the GPU's share alone, with the host, and with nothing of it in the
caches.

A GPU works through a queue while the host fills it. `busy` holds the GPU back until the host is done, so that
what it then does follows without gaps: the figure a faster host could not change. `wall` lets calls follow
one another as the steps of a training do: the slower of the two sets the pace. On a CPU both are the time of
the call.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch

Run = Callable[[], object]
CALLS = 4  # in a row, for a wall time
CYCLES = 2e9  # of torch.cuda._sleep in a second, about: GPUs clock from 1.4 to 2.9 GHz
LONGEST_LEAD = 0.05  # of the host's work that is waited for: a call that itself waits for the GPU has no end


class Stopwatch:
    """Of calls on the CPU."""

    def busy(self, run: Run) -> float:
        """Seconds of the device, without the host."""
        return self.wall(run)

    def cold(self, run: Run) -> float:
        """`busy`, after the caches have been filled with something else."""
        return self.busy(run)

    def wall(self, run: Run) -> float:
        """Seconds a call, of calls in a row."""
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def host(self, run: Run) -> float:
        """Seconds until the call comes back, whether or not the device is done."""
        return self.wall(run)


class CudaStopwatch(Stopwatch):
    """Of calls on the current CUDA device and stream."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._leads: weakref.WeakKeyDictionary[Run, float] = weakref.WeakKeyDictionary()
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * max(cache, 32 << 20), dtype=torch.uint8, device="cuda")

    def busy(self, run: Run) -> float:
        torch.cuda._sleep(int(self._leads.get(run, 0.0) * CYCLES))
        self._start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        self._end.record()
        self._end.synchronize()
        self._leads[run] = min(2 * host, LONGEST_LEAD)
        return self._start.elapsed_time(self._end) / 1e3

    def cold(self, run: Run) -> float:
        self._flush.zero_()
        return self.busy(run)

    def wall(self, run: Run) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / CALLS

    def host(self, run: Run) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def stopwatch(device: torch.device) -> Stopwatch:
    return CudaStopwatch() if device.type == "cuda" else Stopwatch()
