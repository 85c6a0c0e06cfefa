"""What a copy moves on this machine, the yardstick of everything that is bound by memory."""

from __future__ import annotations

import torch

from bench._timing import interleave


class Copy:
    """A call copies `nbytes` from one buffer to another; both have been written, so no page is missing.

    It reads and writes: the traffic of one call is `2 * nbytes`.
    """

    def __init__(self, nbytes: int, device: torch.device | str = "cpu") -> None:
        self.source = torch.ones(max(1, nbytes), dtype=torch.uint8, device=device)
        self.target = torch.ones_like(self.source)
        if self.source.is_cuda:
            self.source.random_()  # a GPU is faster on equal bits

    @property
    def traffic(self) -> int:
        """Bytes read and written by one call."""
        return 2 * self.source.numel()

    def __call__(self) -> None:
        self.target.copy_(self.source)


def copy_gb_s(nbytes: int = 64 << 20, threads: int | None = None) -> float:
    """Gigabytes (1e9) a second, read plus written, of copying `nbytes` with `threads` (default: torch's)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        copy = Copy(nbytes)
        taken = interleave({"copy": copy}, rounds=20, seconds=0.5)
    finally:
        torch.set_num_threads(before)
    return copy.traffic / taken.time("copy").median / 1e9
