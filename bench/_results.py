"""The files of `bench/results`: one JSON per benchmark and machine, written here and read here.

    {"schema": 1, "kind": "adapter_tax", "environment": {..}, "settings": {..}, "rows": [{..}, ..]}

A row says what was measured (its identity: strings and numbers) and what came out: `Spread.to_dict()`s of
milliseconds and of ratios. Rows of kind "gpu" also say which step of `bench.gpu` they are of.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._environment import ROOT, slug

SCHEMA = 1
KINDS = ("adapter_tax", "ops", "basics", "gpu")
HOME = ROOT / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Results:
    """One run of one benchmark on one machine."""

    kind: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "schema": SCHEMA,
            "kind": self.kind,
            "environment": self.environment,
            "settings": self.settings,
        }
        # A row per line: two runs of one machine can be compared with diff.
        rows = ",\n    ".join(json.dumps(row) for row in self.rows)
        text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "rows": [\n    {rows}\n  ]\n}}\n'
        fresh = path.with_name(path.name + ".part")
        fresh.write_text(text)
        os.replace(fresh, path)

    @staticmethod
    def read(path: Path) -> Results:
        """Raises ValueError for a file that is not one of these."""
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA or found.get("kind") not in KINDS:
            raise ValueError(f"{path}: needs schema {SCHEMA} and a kind of {', '.join(KINDS)}")
        return Results(found["kind"], found["environment"], found["settings"], found["rows"])


def default_path(kind: str, environment: dict[str, Any]) -> Path:
    """bench/results/<cpu>/<kind>.json"""
    return HOME / slug(environment) / f"{kind}.json"
