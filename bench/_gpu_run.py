"""A run of `bench.gpu`: what it found, where that goes, and the children that find it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from bench._environment import ROOT, gpu_environment
from bench._results import Results
from bench._stream import Lines, Row, ending, run_child
from bench._suite import environment_for


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended: done, failed or skipped, and why or with what."""

    status: str
    said: str


class Run:
    """One run: where it writes, what it found, and how it says so."""

    def __init__(self, folder: Path, scratch: Path, rehearse: bool, wheels: Path | None) -> None:
        self.folder, self.scratch, self.rehearse, self.wheels = folder, scratch, rehearse, wheels
        self.device = "cpu" if rehearse else "cuda"
        self.env = environment_for(ROOT / "build" / "test-cache") | {"FASTLORA_BENCH_DEVICE": self.device}
        if rehearse:  # tiny tensors: threads would only wait for one another
            self.env["OMP_NUM_THREADS"] = "1"
        self.began = time.time()
        self.results = Results("gpu", gpu_environment(), {"minutes": 0.0, "rehearsal": rehearse}, [])

    @property
    def path(self) -> Path:
        return self.folder / "gpu.json"

    def say(self, text: str) -> None:
        """A line of progress."""
        click.echo(f"[{time.time() - self.began:5.0f} s] {text}")

    def add(self, step: str, row: Row) -> None:
        self.results.rows.append({"step": step, **row})

    def write(self) -> None:
        self.results.settings["minutes"] = round((time.time() - self.began) / 60, 1)
        self.results.write(self.path)

    def keep_earlier(self, steps: Sequence[str]) -> None:
        """Take over what an earlier run of the same commit and GPU found in other steps than these."""
        if not self.path.exists():
            return
        try:
            before = Results.read(self.path)
        except ValueError as error:
            self.say(f"what was there is left out: {error}")
            return
        same = all(before.environment.get(key) == self.results.environment[key] for key in ("gpu", "commit"))
        if same and "+" not in before.environment["commit"]:
            self.results.rows[:] = [row for row in before.rows if row["step"] not in steps]


def stream(run: Run, step: str, module: Sequence[str], until: float) -> Outcome:
    """Run a module that appends lines, and again behind the case at which it ended; record its rows."""
    path, log = run.scratch / f"{step}.jsonl", run.scratch / f"{step}.log"
    lines, seen = Lines(path), _Seen(run, step)
    while True:
        at = seen.at
        arguments = ["--stream", str(path), "--until", str(until), "--skip", str(seen.at + 1)]
        command = [sys.executable, "-m", *module, *arguments]
        code = run_child(command, run.env, log, until, lambda: seen.take(lines.fresh()))
        if code == 0:
            return seen.outcome()
        seen.ended(ending(code, log))
        if code is None or seen.at == at:  # it did not come to a case
            return seen.outcome()


class _Seen:
    """What a child's lines have said so far."""

    def __init__(self, run: Run, step: str) -> None:
        self._run, self._step = run, step
        self.at, self._case, self._rows, self._left, self._reported = -1, "the start", 0, 0, False
        self.failed: list[str] = []

    def take(self, lines: Sequence[Row]) -> None:
        """Record them, write them, and only then talk about them."""
        for line in lines:
            self._left += line.get("left", 0)
            if "case" in line:
                self.at, self._case, self._reported = line["at"], line["case"], False
            if "row" in line:
                self._rows += 1
                self._run.add(self._step, line["row"])
            if "failed" in line:
                self._fail(line["failed"])
        if lines:
            self._run.write()
        for line in lines:
            if "row" in line:
                self._run.say(f"{self._step}: {brief(line['row'])}")

    def ended(self, said: str) -> None:
        """The child ended before its time, or at the end of it, within a case or before the first."""
        if not self._reported:
            self._fail(f"its process ended: {said}")
            self._run.write()

    def _fail(self, reason: str) -> None:
        self._reported = True
        self.failed.append(f"{self._case}: {reason}")
        self._run.add(self._step, {"case": self._case, "failed": reason})
        self._run.say(f"{self._step}: {self._case} FAILED: {reason}")

    def outcome(self) -> Outcome:
        said = f"{self._rows} rows" + f", {self._left} cases left out for lack of time" * bool(self._left)
        if self.failed:
            return Outcome("failed", f"{said}; {len(self.failed)} failed: {'; '.join(self.failed)[:300]}")
        return Outcome("done" if self._rows else "failed", said)


def brief(row: Row) -> str:
    """A row in a line of the log."""
    if "question" in row:
        assumed = "" if row["assumed"] is None else f" (assumed {row['assumed']})"
        return f"{row['question']}: {row['case']}: {row['value']} {row['unit']}{assumed}"
    if "tax" in row:
        taxes = ", ".join(f"{name} {tax['median']:.2f}" for name, tax in row["tax"].items())
        case = f"{row['model']} {row['level']} {row['storage']} {row['feature']} T={row['tokens']}"
        return f"{case}: base {row['ms']['base']['median']:.3f} ms, tax {taxes}"
    if "op" in row:
        share = f"{row['ms']['median'] * 1e3:.1f} us, {row['percent_of_copy']:.0f} % of a copy"
        return f"{row['op']} {row['case']} {row['dtype']} {row['variant']}: {share}"
    ((name, value),) = row.items()
    return f"{name}: {', '.join(f'{key} {said}' for key, said in value.items())}"
