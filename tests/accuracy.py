"""The accuracy rule, and inputs that go wrong where code is careless."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def name_of(value: object) -> str:
    """Readable test ids: "bfloat16" for a dtype."""
    return str(value).removeprefix("torch.")


def error(z: Tensor, exact: Tensor) -> float:
    """||z - exact|| / ||exact|| in float64."""
    exact = exact.double()
    return float((z.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, what: str = "") -> None:
    """e(ours) <= 1.1 e(theirs) + 1e-7 against `exact`."""
    assert ours.shape == exact.shape and ours.isfinite().all(), what
    mine, other = error(ours, exact), error(theirs, exact)
    assert mine <= 1.1 * other + 1e-7, f"{what}: error {mine:.3g}, theirs {other:.3g}"


def assert_as_exact_on_average(pairs: Iterable[tuple[float, float]], what: str = "") -> None:
    """The rule over several seeds: mean e(ours) <= 1.1 mean e(theirs) + 1e-7."""
    mine, other = (sum(column) / len(column) for column in zip(*pairs, strict=True))
    assert mine <= 1.1 * other + 1e-7, f"{what}: mean error {mine:.3g}, theirs {other:.3g}"


def rows(count: int, cols: int, dtype: torch.dtype, *, pitch: int | None = None, seed: int = 0) -> Tensor:
    """Normal values in rows `pitch` apart: catches code that takes rows for packed."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(count, pitch or cols, generator=generator, dtype=torch.float64)
    return wide.to(dtype)[:, :cols]


def fenced(count: int, cols: int, dtype: torch.dtype, margin: int = 5) -> tuple[Tensor, Tensor]:
    """(out, all of it): an output inside a larger tensor of sevens, to see what is written beside it."""
    everything = torch.full((count + 2, cols + 2 * margin), 7.0, dtype=dtype)
    return everything[1 : count + 1, margin : margin + cols], everything


def assert_fence_untouched(everything: Tensor, margin: int = 5) -> None:
    inside = torch.zeros_like(everything, dtype=torch.bool)
    inside[1:-1, margin : everything.shape[1] - margin] = True
    assert (everything[~inside] == 7.0).all()
