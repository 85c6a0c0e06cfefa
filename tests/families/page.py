"""Writes docs/families.md: `PYTHONPATH=tests python -m families.page > docs/families.md`."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import pyfastlora
from pyfastlora.patching import PatchReport

from .models import FAMILIES, Family, adapted

_HEAD = """\
# What runs fused in which family

A tiny random model of each family, with LoRA on every linear layer but the head, on the input embedding and,
where there are any, on the parameters of the experts. The tests train each for 32 steps, patched and not, and
compare the losses. Layers that are fed one tensor and run as one node stand together; every name stands for
all layers that have it. What is left to PEFT runs PEFT's own forward, for the reason given. A layer that the
model never calls, because it reads the weight beneath by itself, is fused in vain: its adapter has no effect,
with PEFT as little as here.

In some families with experts (DeepSeek's is one here) PEFT takes `gate_proj`, `up_proj` and `down_proj` for
the experts' parameters alone, so that dense layers and shared experts of these names get no adapter.

This page is made from the reports of these models, by
`PYTHONPATH=tests python -m families.page > docs/families.md`.

| family | fused | left to PEFT, and why |
|---|---|---|
"""

NEVER_CALLED = "never called"


def markdown(reports: Iterable[tuple[Family, PatchReport]]) -> str:
    """The whole page."""
    return _HEAD + "".join(line(family, report) for family, report in reports)


def line(family: Family, report: PatchReport) -> str:
    """The family's line of the table."""
    fused: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for row in report:
        *_, name = (part for part in row.name.removesuffix(".base_layer").split(".") if not part.isdigit())
        if row.fused and row.calls_fused:
            names = fused.setdefault(row.region, [])
        else:
            names = left.setdefault(row.reason or NEVER_CALLED, [])
        if name not in names:
            names.append(name)
    # a region of several layers names them itself
    done = [region if " " in region else f"{region} {', '.join(names)}" for region, names in fused.items()]
    rest = [f"{', '.join(names)}: {reason}" for reason, names in left.items()]
    return f"| {family} | {'<br>'.join(sorted(done))} | {'<br>'.join(sorted(rest))} |\n"


def report_of(family: Family, steps: int = 3) -> PatchReport:
    """The report of the family's model after so many forwards; groups are known by the second."""
    model, batch = adapted(family), family.inputs()
    pyfastlora.patch(model)
    for _ in range(steps):
        model(**batch)
    return pyfastlora.report(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(markdown((family, report_of(family)) for family in FAMILIES), end="")
