"""The families of transformers: 32 steps give PEFT's losses, and the report is the one in docs/families.md.

What could break: a family that feeds or uses its linears in a way of its own (packed, clamped, shared,
written to in place, called for some tokens only), or a group, an MLP or an embedding that was taken for
one and is none.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyfastlora
from pyfastlora.patching import PatchReport

from . import page
from .models import FAMILIES, Family, adapted

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
STEPS = 32
# Both sides round every step by 1e-7, and AdamW divides by the size of the gradient, so that a difference
# in a gradient near 0 moves its parameter as much as one in a large gradient. The largest seen over 32
# steps is 1.3e-5, in DeepSeek's low-rank attention with its routed experts; most families stay at one unit
# of the last place.
BOUND = 1e-4


@functools.cache
def trained(family: Family) -> tuple[list[float], list[float], PatchReport]:
    """PEFT's losses, ours, and our report."""
    peft = adapted(family)
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    return losses(peft, family), losses(ours, family), pyfastlora.report(ours)


def losses(model: nn.Module, family: Family) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch: dict[str, Any] = family.inputs()
    model.train()
    torch.manual_seed(11)
    found = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_losses_are_pefts(family: Family) -> None:
    theirs, ours, report = trained(family)
    assert theirs[-1] < theirs[0] - 0.5  # it learns: a curve that stays flat would compare nothing
    assert ours == pytest.approx(theirs, rel=BOUND)
    for row in report:
        if row.name.endswith(family.uncalled):
            assert row.calls_fused == row.calls_fallback == 0
        elif row.fused:
            assert row.calls_fused >= STEPS and row.calls_fallback == 0, row
        else:
            assert row.reason, row


def test_the_page_is_up_to_date() -> None:
    expected = page.markdown((family, trained(family)[2]) for family in FAMILIES)
    assert PAGE.read_text() == expected, "PYTHONPATH=tests python -m families.page > docs/families.md"
