"""What `patch` did and what its layers have done since, as rows and as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_HEAD = ("module", "layer", "runs", "backend", "fused calls", "PEFT calls", "error", "reason")


@dataclass(frozen=True, slots=True)
class Row:
    """One LoRA layer."""

    name: str
    layer: str  #: its PEFT class
    fused: bool  #: its calls run fused, as far as can be told without the next input
    region: str  #: "linear", "embedding", "group q_proj, v_proj" or "mlp" (one node), "none": PEFT's forward
    backend: str  #: the kernels: as given to `patch`, "auto" by what it came to; "" when PEFT's forward runs
    reason: str  #: why it is not fused; of a fused layer, why its latest PEFT call was one ("" without one)
    calls_fused: int = 0
    calls_fallback: int = 0
    error: float | None = None  #: with verify=True: the largest relative difference from PEFT
    note: str = ""  #: what qualifies that figure, and why a larger region did not run


class PatchReport:
    """The rows of one model, in module order."""

    def __init__(self, rows: list[Row], loss: Sequence[str] = ()) -> None:
        self.rows = rows
        #: a sentence for each model whose loss was asked for, `patch(model, loss=True)`
        self.loss = list(loss)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of the module with that name, or of the only module whose name ends in it."""
        found = [row for row in self.rows if row.name == name or row.name.endswith("." + name)]
        if len(found) != 1:
            raise KeyError(f"{name}: {len(found)} LoRA layers have this name or end in it")
        return found[0]

    @property
    def fused(self) -> int:
        """Number of layers that run fused."""
        return sum(row.fused for row in self.rows)

    @property
    def total(self) -> int:
        """Number of LoRA layers."""
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the two counts, every row, and the sentences on losses."""
        rows = [asdict(row) for row in self.rows]
        return {"fused": self.fused, "total": self.total, "rows": rows, "loss": self.loss}

    def summary(self) -> str:
        """The last line of the table."""
        if not self.rows:
            return "no LoRA layers: patch the model that get_peft_model() returned"
        noun = "linears" if all("Linear" in row.layer for row in self.rows) else "layers"
        return f"fused {self.fused} of {self.total} LoRA {noun}"

    def table(self, *, full: bool = False) -> str:
        """Text: a line per module, or (not `full`) per set of modules that differ in a layer number only."""
        lines = [_cells(rows) for rows in _groups(self.rows, full)]
        if not lines:
            return "\n".join([self.summary(), *self.loss])
        shown = [column for column in range(len(_HEAD)) if any(line[column] for line in lines)]
        table = [[line[column] for column in shown] for line in (_HEAD, *lines)]
        widths = [max(len(line[column]) for line in table) for column in range(len(shown))]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], self.summary(), *self.loss])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<PatchReport: {self.summary()}>"


def _groups(rows: list[Row], full: bool) -> list[list[Row]]:
    if full:
        return [[row] for row in rows]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(
            (_pattern(row.name), row.layer, row.region, row.backend, row.reason, row.note), []
        ).append(row)
    return list(groups.values())


def _cells(rows: list[Row]) -> tuple[str, ...]:
    first = rows[0]
    name = first.name if len(rows) == 1 else f"{_pattern(first.name)} ({len(rows)})"
    errors = [row.error for row in rows if row.error is not None]
    fused, fallback = sum(row.calls_fused for row in rows), sum(row.calls_fallback for row in rows)
    return (
        name,
        first.layer,
        f"fused {first.region}" if first.fused else "PEFT",
        first.backend,
        str(fused) if fused + fallback else "",
        str(fallback) if fused + fallback else "",
        f"{max(errors):.1e}" if errors else "",
        "; ".join(text for text in (first.reason, first.note) if text),
    )


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
