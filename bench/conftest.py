"""The fixture of every benchmark of an op: a timer, and a copy's bandwidth beside it.

The timer is pytest-benchmark's; where `bench.ops` streams its rows, and so on every GPU, the device's
stopwatch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bench._bandwidth import Copy
from bench._cases import DEVICE, TAKE_ROW, ours, short
from bench._stopwatch import stopwatch
from bench._timing import interleave
from pyfastlora.ops import all_ops, backend
from pyfastlora.ops._registry import problem_of

FLOORS = ("memcpy", "dense")
Call = Callable[[], object]
Measure = Callable[..., None]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's thread count for one benchmark: the parameter's, else as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def measure(request: pytest.FixtureRequest, threads: int) -> Measure:
    """measure(op, variant, call, case=.., dtype=.., moved=..): time `call` as one variant of a case of an op.

    case: words that identify the input; dtype: of the activations or of the output; moved: bytes that the op
    has to read and write at least. A copy that moves as many is timed right before and right after, for the
    share of its bandwidth. Further keywords are callables to compare with, in turns with `call`. Skips where
    an implementation of ours cannot run.
    """

    def run(
        op: str,
        variant: str,
        call: Call,
        *,
        case: str,
        dtype: torch.dtype,
        moved: int,
        **beside: Call,
    ) -> None:
        mine = variant in ours(op)
        if mine and (reason := _objection(op, variant, dtype)):
            pytest.skip(f"{op}: `{variant}` {reason}")
        row = {
            "op": op,
            "case": case,
            "dtype": short(dtype),
            "threads": threads,
            "variant": variant,
            "role": "ours" if mine else "floor" if variant in FLOORS else "other",
            "bytes": moved,
        }
        copy = Copy(moved // 2, DEVICE)
        take = request.config.stash.get(TAKE_ROW, None)
        with backend(variant) if mine else nullcontext(), torch.no_grad():
            if take:
                take(row | _by_the_device(copy, call, beside))
            else:
                benchmark = request.getfixturevalue("benchmark")
                benchmark.extra_info.update(row | _by_pytest_benchmark(benchmark, copy, call, beside))

    return run


def _by_pytest_benchmark(benchmark: Any, copy: Copy, call: Call, beside: dict[str, Call]) -> dict[str, Any]:
    copies = _seconds(copy)
    benchmark(call)
    copies += _seconds(copy)
    turns = interleave({"call": call, **beside}, rounds=20, seconds=0.3) if beside else None
    seconds = statistics.median(copies)
    return {
        "copy_gb_s": round(copy.traffic / seconds / 1e9, 2),
        "percent_of_copy": round(100 * seconds / benchmark.stats.stats.median, 1),
        "ratio": {name: turns.ratio("call", name).to_dict() for name in beside} if turns else {},
    }


def _by_the_device(copy: Copy, call: Call, beside: dict[str, Call]) -> dict[str, Any]:
    """All of them in turns, each with nothing in the caches; and the call in a row with the host, as it is
    used.
    """
    watch = stopwatch(DEVICE)
    turns = interleave(
        {"copy": copy, "call": call, **beside}, rounds=30, at_least=4, seconds=0.1, warmup=3, timed=watch.cold
    )
    with_host = interleave({"call": call}, rounds=5, at_least=2, seconds=0.05, timed=watch.wall)
    return {
        "ms": turns.time("call").to_dict(1e3),
        "wall_ms": with_host.time("call").to_dict(1e3),
        "rounds": len(turns),
        "copy_gb_s": round(copy.traffic / turns.time("copy").median / 1e9, 2),
        "percent_of_copy": round(100 * turns.ratio("copy", "call").median, 1),
        "ratio": {name: turns.ratio("call", name).to_dict() for name in beside},
    }


def _seconds(copy: Copy) -> list[float]:
    return interleave({"copy": copy}, rounds=20, seconds=0.05).seconds["copy"]


def _objection(op: str, variant: str, dtype: torch.dtype) -> str | None:
    (found,) = [each for each in all_ops() if each.name == op]
    return dict(found.candidates(problem_of(DEVICE, dtype)))[variant]
