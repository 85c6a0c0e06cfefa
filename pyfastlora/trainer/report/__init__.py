"""report.html: a run as one page, made of the files of its folder alone.

facts.py reads the folder, curves.py draws the records as SVG, page.py puts the page together. The page asks
nobody for anything: no script, no font, no picture from elsewhere, and a policy in its head that says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyfastlora.trainer.console import Console
from pyfastlora.trainer.report.facts import Facts
from pyfastlora.trainer.report.page import page
from pyfastlora.trainer.run_dir import RunDir

NAME = "report.html"


def write_report(run_dir: Path, to: Path | None = None) -> Path:
    """The report of the run in a folder, in it or at `to`. Raises UserError where there is no run."""
    path = to or run_dir / NAME
    RunDir(path.parent).write_text(path.name, page(Facts.read(run_dir)))
    return path


@contextmanager
def reported(run_dir: RunDir, console: Console) -> Iterator[None]:
    """Writes the report behind a with block that has written to the log, however it ends.

    A disk that has no room for it takes nothing from the run.
    """
    log = run_dir.path / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else None
    try:
        yield
    finally:
        if run_dir.writes and log.exists() and log.stat().st_mtime_ns != before:
            try:
                console.say(f"report: {write_report(run_dir.path)}")
            except OSError as error:
                (run_dir.path / f".{NAME}.new").unlink(missing_ok=True)
                console.say(f"no report: {error}; fastlora report {run_dir.path} makes it")
