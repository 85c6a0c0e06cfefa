"""The search behind `fastlora tune`: launch configurations of the Triton kernels, timed on the present GPU.

From the configuration in force on, one setting after the other tries its values, all of them in turns, and
keeps the fastest, until a whole round changes nothing. What is found goes to the user's table, which the
launchers read before the shipped one (kernels_triton/_tuning.py).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyfastlora
from pyfastlora import _cache, ops

Config = dict[str, int]
Seconds = Callable[[Sequence[Config]], list[float]]

GAIN = 0.98  # a candidate that takes more of the present time is taken for noise
SWEEPS = 4
ROUNDS = 25
FLUSH = 512 << 20  # bytes written between two runs: twice what any L2 holds

WARPS, STAGES, PROGRAMS = (2, 4, 8), (2, 3, 4, 5, 6), (128, 256, 512, 1024)
FACTOR = {"num_warps": WARPS, "num_stages": STAGES, "programs": PROGRAMS}
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "dequant_4bit": {"BLOCK": (128, 256, 512, 1024), "num_warps": WARPS},
    "dequant_8bit": {"BLOCK": (1024, 2048, 4096), "num_warps": WARPS},
    "dora_grad": {"BLOCK_T": (4, 8, 16), "BLOCK_O": (64, 128, 256), **FACTOR},
    "dora_norm": {
        "BLOCK_O": (16, 32, 64),
        "BLOCK_I": (64, 128),
        "BLOCK_R": (16, 32, 64),
        "STAGES": STAGES,
        "num_warps": WARPS,
    },
    "dropout_apply": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": WARPS},
    "dropout_mask": {"BLOCK": (128, 256, 512), "num_warps": WARPS},
    "glu_backward": {"BLOCK": (512, 1024, 2048), "num_warps": WARPS},
    "glu_forward": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": WARPS},
    "lora_backward": {"BLOCK_T": (16, 32, 64, 128), "BLOCK_O": (64, 128), **FACTOR},
    "lora_expand": {
        "BLOCK_T": (32, 64, 128),
        "BLOCK_O": (64, 128, 256),
        "BLOCK_R": (16, 32, 64),
        "num_warps": WARPS,
        "num_stages": STAGES,
    },
    "lora_grad": {"BLOCK_T": (32, 64, 128), "BLOCK_I": (32, 64, 128), "BLOCK_R": (16, 32, 64, 128), **FACTOR},
    "lora_shrink": {
        "BLOCK_T": (16, 32, 64, 128),
        "BLOCK_I": (32, 64, 128),
        "BLOCK_R": (16, 32, 64, 128),
        **FACTOR,
    },
    "matmul_4bit": {"BLOCK_O": (16, 32, 64), "BLOCK_I": (32, 64, 128, 256), **FACTOR},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer and what meets it: x [tokens, ins], W [outs, ins], factors of rank `ranks`."""

    tokens: int
    ins: int
    outs: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Finding:
    """The best configuration of an op for one bucket of sizes; seconds before and after."""

    op: str
    dtype: str
    bounds: str
    config: Config
    before: float
    after: float


def tune(
    names: Sequence[str], shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], device: torch.device
) -> Iterator[Finding]:
    """A finding for every op, dtype and bucket of sizes, from the largest shape that falls into it."""
    from pyfastlora.kernels_triton import _tuning

    seen = set()
    largest_first = sorted(shapes, key=lambda shape: -shape.tokens * shape.ins * shape.outs * shape.ranks)
    for op, dtype, shape in itertools.product(names, dtypes, largest_first):
        with ops.backend("triton"):
            call = subject(op, shape, dtype, device)
            _tuning.forget()
            call()
            name, sizes = next(asked[1:] for asked in _tuning.asked() if asked[0] == op)
            bounds = ",".join(map(str, sizes)) or "*"
            if (op, dtype, bounds) in seen:
                continue
            seen.add((op, dtype, bounds))
            start = _tuning.entry(op, _tuning.arch_of(device), name, *sizes)
            try:
                found = search(start, VALUES[op], Timer(op, call, device))
            finally:
                _tuning.force({})
        yield Finding(op, name, bounds, *found)


def search(
    start: Config, values: dict[str, tuple[int, ...]], seconds: Seconds
) -> tuple[Config, float, float]:
    """(the best configuration found from `start` on, seconds of `start`, seconds of the best).

    `seconds` times configurations in turns; infinity is for one that does not run.
    """
    best, before, after = dict(start), math.nan, math.nan
    for _ in range(SWEEPS):
        settled = True
        for key, options in values.items():
            others = [best | {key: value} for value in options if value != best.get(key)]
            after, *times = seconds([best, *others])
            before = after if math.isnan(before) else before
            if min(times) < GAIN * after:
                after, best = min(zip(times, others, strict=True), key=lambda pair: pair[0])
                settled = False
        if settled:
            break
    return best, before, after


class Timer:
    """Medians of a call's seconds under several configurations of its op, run in turns from a cold L2."""

    def __init__(self, op: str, call: Callable[[], object], device: torch.device) -> None:
        self.op, self.call = op, call
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def __call__(self, configs: Sequence[Config]) -> list[float]:
        runs = [self._runs(config) for config in configs]
        taken: list[list[float]] = [[] for _ in configs]
        for _ in range(ROUNDS):
            for config, runs_at_all, times in zip(configs, runs, taken, strict=True):
                if runs_at_all:
                    times.append(self._time(config))
        return [statistics.median(times) if times else math.inf for times in taken]

    def _runs(self, config: Config) -> bool:
        """Whether it compiles and fits the chip; compiles it."""
        import triton

        try:
            self._time(config)
        except (RuntimeError, triton.TritonError):
            return False
        return True

    def _time(self, config: Config) -> float:
        from pyfastlora.kernels_triton import _tuning

        _tuning.force({self.op: config})
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # long enough for the launches to be queued behind it
        begin.record()
        self.call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def write(found: Finding, arch: str) -> Path:
    """Put a finding into the user's table, beside what it has. Raises OSError where none can be written."""
    from pyfastlora.kernels_triton import _tuning

    there = _tuning.user_tables()
    table: dict[str, Any] = {"format": _tuning.FORMAT, **(there[1] if there else {})}
    by_op = table.setdefault(pyfastlora.__version__, {})
    by_op.setdefault(found.op, {}).setdefault(arch, {}).setdefault(found.dtype, {})[found.bounds] = (
        found.config
    )
    refused = []
    for directory in _cache.cache_dirs():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _cache.distrust(directory):
                refused.append(reason)
                continue
            with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
                json.dump(table, file, indent=2)
            os.replace(file.name, directory / _tuning.FILE)
        except OSError as error:
            refused.append(f"{directory}: {error.strerror}")
        else:
            _tuning.forget()
            return directory / _tuning.FILE
    raise OSError(f"no cache directory is usable ({'; '.join(refused)}); set FASTLORA_CACHE")


# ---- subjects ----


def subject(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A call of the op on random tensors of the shape."""
    T, ins, outs, ranks = shape.tokens, shape.ins, shape.outs, shape.ranks

    def noise(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, device=device).to(of)

    if op == "dequant_4bit":
        w, out = _nf4(outs, ins, dtype, device), noise(outs, ins)
        return lambda: ops.dequant_4bit(w, out=out)
    if op == "dequant_8bit":
        values = torch.randint(-127, 128, (outs, ins), dtype=torch.int8, device=device)
        rows8, out = ops.Packed8bit(values, torch.rand(outs, device=device), dtype), noise(outs, ins)
        return lambda: ops.dequant_8bit(rows8, out=out)
    if op == "matmul_4bit":
        w, x = _nf4(outs, ins, dtype, device), noise(min(T, 16), ins)
        return lambda: ops.matmul_4bit(x, w)
    if op == "dora_norm":
        dense, a = noise(outs, ins), noise(ranks, ins, of=torch.float32)
        b = noise(outs, ranks, of=torch.float32)
        return lambda: ops.dora_norm(dense, a, b, 2.0)
    if op in ("dora_grad", "glu_forward", "glu_backward"):
        y, z, gain = noise(T, outs), noise(T, outs), noise(outs, of=torch.float32)
        if op == "dora_grad":
            return lambda: ops.dora_grad(y, z, gain)
        return (lambda: ops.glu_forward(y, z)) if op == "glu_forward" else (lambda: ops.glu_backward(y, y, z))
    x, factor = noise(T, ins), noise(ranks, ins, of=torch.float32)
    s = noise(T, ranks, of=torch.float32)
    if op == "lora_shrink":
        return lambda: ops.lora_shrink(x, factor)
    if op == "lora_backward":
        few = min(ranks, 4)  # more may be two passes, of two other ops
        dy, b = noise(T, outs), noise(outs, few, of=torch.float32)
        return lambda: ops.lora_backward(dy, b, s[:, :few])
    if op == "lora_grad":
        return lambda: ops.lora_grad(s, x)
    if op == "lora_expand":
        return lambda: ops.lora_expand(x, s, factor, transposed=True)
    if op == "dropout_mask":
        return lambda: ops.dropout_mask(x, 0.1)
    mask = ops.dropout_mask(x, 0.1)
    return lambda: ops.dropout_apply(x, mask)


def _nf4(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> ops.Packed4bit:
    blocks = -(-rows * cols // 64)
    sizes = (-(-rows * cols // 2), blocks)
    packed, absmax = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for size in sizes)
    code, nested, offset = (torch.rand(size, device=device) for size in (256, -(-blocks // 256), 1))
    return ops.Packed4bit(packed, absmax, (rows, cols), dtype, 64, "nf4", code, nested, offset)
