"""What the folder of a run says of it; files that a run has not come to are left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pyfastlora.trainer.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """Of one run. What is {} or "" is not there."""

    path: Path
    config: dict[str, Any]
    original: str
    environment: dict[str, Any]
    data: dict[str, Any]
    plan: dict[str, Any]
    strategy: dict[str, Any]
    kernels: str
    samples: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Facts:
        """Of the run in a folder. Raises ConfigError where there is none."""
        if not (path / "config.resolved.yaml").is_file():
            what = "has no config.resolved.yaml" if path.is_dir() else "no such folder"
            raise ConfigError(f"{path}: {what}; give the output_dir of a run")
        lines = _text(path / "log.jsonl").splitlines()
        return cls(
            path=path,
            config=yaml.safe_load(_text(path / "config.resolved.yaml")) or {},
            original=_text(path / "config.original.yaml"),
            **{k: _json(path / f"{k}.json") for k in ("data", "plan", "strategy", "samples")},
            environment=_json(path / "env.json"),
            kernels=_text(path / "kernels.txt"),
            log=[found for line in lines if (found := _object(line))],
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Lines of the log of one kind, in order."""
        return [line for line in self.log if line.get("event") == name]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of the logging steps."""
        return self.events("train")

    @property
    def steps(self) -> int:
        """Of the newest line that has one."""
        return max((int(line.get("step", 0)) for line in self.log), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.events("end"))

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """Steps and held-out losses."""
        return [(int(x["step"]), number(x["eval_loss"])) for x in self.events("eval")]

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens, and those that were trained on."""
        return tuple(sum(int(r.get(k, 0)) for r in self.records) for k in ("tokens", "trained_tokens"))  # type: ignore[return-value]

    @property
    def seconds(self) -> float:
        """Spent in training steps."""
        return sum(number(r.get("seconds", 0)) for r in self.records)

    @property
    def started(self) -> datetime | None:
        """When the first step began, or a little before."""
        return datetime.fromisoformat(self.log[0]["time"]) if self.log else None

    @property
    def best_held_out(self) -> tuple[int, float] | None:
        """Step and value of the lowest held-out loss."""
        finite = [pair for pair in self.held_out if math.isfinite(pair[1])]
        return min(finite, key=lambda pair: pair[1], default=None)


def number(value: Any) -> float:
    """A number of the log, where nan and inf are text."""
    return float(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return _object(_text(path)) or {}


def _object(text: str) -> dict[str, Any] | None:
    """A process that was killed may have left half a line."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
