"""The fixture of every benchmark of an op: pytest-benchmark's timer, and a copy's bandwidth beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bench._bandwidth import Copy
from bench._cases import ours, short
from bench._timing import interleave
from pyfastlora.ops import all_ops, backend
from pyfastlora.ops._registry import Problem, arch_of

FLOORS = ("memcpy", "dense")
Measure = Callable[..., None]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's thread count for one benchmark: the parameter's, else as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, threads: int) -> Measure:
    """measure(op, variant, call, case=.., dtype=.., moved=..): time `call` as one variant of a case of an op.

    case: words that identify the input; dtype: of the activations or of the output; moved: bytes that the op
    has to read and write at least. A copy that moves as many is timed right before and right after, for the
    share of its bandwidth. Further keywords are callables to compare with, in turns with `call`. Skips where
    an implementation of ours cannot run.
    """

    def run(
        op: str,
        variant: str,
        call: Callable[[], object],
        *,
        case: str,
        dtype: torch.dtype,
        moved: int,
        **beside: Callable[[], object],
    ) -> None:
        mine = variant in ours(op)
        if mine and (reason := _objection(op, variant, dtype)):
            pytest.skip(f"{op}: `{variant}` {reason}")
        copy = Copy(moved // 2)
        with backend(variant) if mine else nullcontext(), torch.no_grad():
            copies = _seconds(copy)
            benchmark(call)
            copies += _seconds(copy)
            turns = interleave({"call": call, **beside}, rounds=20, seconds=0.3) if beside else None
        seconds = statistics.median(copies)
        benchmark.extra_info.update(
            op=op,
            case=case,
            dtype=short(dtype),
            threads=threads,
            variant=variant,
            role="ours" if mine else "floor" if variant in FLOORS else "other",
            bytes=moved,
            copy_gb_s=round(copy.traffic / seconds / 1e9, 2),
            percent_of_copy=round(100 * seconds / benchmark.stats.stats.median, 1),
            ratio={name: turns.ratio("call", name).to_dict() for name in beside} if turns else {},
        )

    return run


def _seconds(copy: Copy) -> list[float]:
    return interleave({"copy": copy}, rounds=20, seconds=0.05).seconds["copy"]


def _objection(op: str, variant: str, dtype: torch.dtype) -> str | None:
    (found,) = [each for each in all_ops() if each.name == op]
    problem = Problem("cpu", arch_of(torch.device("cpu")), str(dtype).removeprefix("torch."))
    return dict(found.candidates(problem))[variant]
