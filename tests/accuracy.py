"""The accuracy rule, the device it is asked on, and inputs that go wrong where code is careless."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pyfastlora.ops import Problem, all_ops

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Where tests/ops, tests/fused and tests/patching compute: their tensors are made there (tests/conftest.py).
DEVICE = torch.device(os.environ.get("FASTLORA_TEST_DEVICE", "cpu"))


class NameOf(str):
    """The name of an implementation, which knows whose it is: tests/covered.py asks."""

    ops: tuple[str, ...]


def implementations(op: str, *others: str) -> list[str]:
    """Names of the op's implementations for tensors on `DEVICE`, best first; each a NameOf. `others` are ops
    of the same implementations that a test calls beside it.

    Also of one that will turn out not to run: an error of its tests then, not a gap in them.
    """
    (found,) = [each for each in all_ops() if each.name == op]
    # Objections name the device first, and float64 objects before anything is built.
    objections = found.candidates(Problem(DEVICE.type, "", "float64"))
    names = [NameOf(name) for name, reason in objections if "tensors; these are on" not in (reason or "")]
    for name in names:
        name.ops = (op, *others)
    return list(names)


def rng_state() -> Tensor:
    """Of the generator that `DEVICE` draws from."""
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: Tensor) -> None:
    torch.cuda.set_rng_state(state) if DEVICE.type == "cuda" else torch.set_rng_state(state)


@contextmanager
def process_group() -> Iterator[DeviceMesh]:
    """A process group of this process alone, and the mesh of it."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh(DEVICE.type, (1,))
    finally:
        dist.destroy_process_group()


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values on `DEVICE`, the same for a seed on every device: they are drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(DEVICE, dtype)


def bitsandbytes() -> Any:
    """The module; without it the test that asks is skipped."""
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install pyfastlora[qlora]")


def name_of(value: object) -> str:
    """Readable test ids: "bfloat16" for a dtype."""
    return str(value).removeprefix("torch.")


def error(z: Tensor, exact: Tensor) -> float:
    """||z - exact|| / ||exact|| in float64."""
    exact = exact.double()
    return float((z.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, what: str = "", terms: int = 0) -> None:
    """e(ours) <= 1.1 e(theirs) + 1e-7 against `exact`.

    terms: ours may also have the error of one float32 accumulator over so many random terms,
    sqrt(terms / 6) 2^-24: where theirs is a GEMM whose many partial sums, other ones on every CPU, do better.
    """
    assert ours.shape == exact.shape and ours.isfinite().all(), what
    mine, other = error(ours, exact), max(error(theirs, exact), (terms / 6) ** 0.5 * 2**-24)
    assert mine <= 1.1 * other + 1e-7, f"{what}: error {mine:.3g}, theirs {other:.3g}"


def assert_as_exact_on_average(pairs: Iterable[tuple[float, float]], what: str = "") -> None:
    """The rule over several seeds: mean e(ours) <= 1.1 mean e(theirs) + 1e-7."""
    mine, other = (sum(column) / len(column) for column in zip(*pairs, strict=True))
    assert mine <= 1.1 * other + 1e-7, f"{what}: mean error {mine:.3g}, theirs {other:.3g}"


def rows(count: int, cols: int, dtype: torch.dtype, *, pitch: int | None = None, seed: int = 0) -> Tensor:
    """Normal values in rows `pitch` apart: catches code that takes rows for packed."""
    return noise(count, pitch or cols, dtype=dtype, seed=seed)[:, :cols]


def fenced(count: int, cols: int, dtype: torch.dtype, margin: int = 5) -> tuple[Tensor, Tensor]:
    """(out, all of it): an output inside a larger tensor of sevens, to see what is written beside it."""
    everything = torch.full((count + 2, cols + 2 * margin), 7.0, dtype=dtype, device=DEVICE)
    return everything[1 : count + 1, margin : margin + cols], everything


def assert_fence_untouched(everything: Tensor, margin: int = 5) -> None:
    inside = torch.zeros_like(everything, dtype=torch.bool)
    inside[1:-1, margin : everything.shape[1] - margin] = True
    assert (everything[~inside] == 7.0).all()
