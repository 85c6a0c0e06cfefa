"""Rows that outlive the process that measures them: a child appends lines to a file, `bench.gpu` reads them.

    {"at": 3, "case": "8B linears .."}    case 3 begins
    {"at": 3, "row": {..}}                a row of it
    {"at": 3, "failed": ".."}             or why there is none
    {"left": 12}                          cases that no time was left for

A kernel that faults takes its process's GPU context along: the child then ends with `LOST`, and another goes
on behind the case.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench._environment import ROOT

Row = dict[str, Any]
C = TypeVar("C")
LOST = 86
GRACE = 10.0  # seconds between a child's deadline, which it looks at between cases, and its end


# ---- the child's side -------------------------------------------------------------------------------------


class Sink:
    """Where a child's lines go. until: seconds since the epoch."""

    def __init__(self, path: Path, until: float) -> None:
        self._file = path.open("a", buffering=1)
        self._until = until

    @property
    def over(self) -> bool:
        """Whether no further case may begin."""
        return time.time() > self._until

    def write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


def serve(cases: Sequence[C], measure: Callable[[C], Sequence[Row]], sink: Sink, skip: int = 0) -> None:
    """Measure one case after the other, from `skip` on. A case that raises leaves its reason."""
    for at, case in enumerate(cases[skip:], skip):
        if sink.over:
            sink.write(left=len(cases) - at)
            return
        sink.write(at=at, case=str(case))
        try:
            for row in measure(case):
                sink.write(at=at, row=row)
        except Exception as error:
            sink.write(at=at, failed=reason_of(error))
            if context_is_lost():
                sys.exit(LOST)
        gc.collect()  # modules refer to themselves: without this two cases would be in memory at once


def reason_of(error: BaseException) -> str:
    """One line of an exception."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {plain(said[0])[:200]}" if said else type(error).__name__


def plain(text: str) -> str:
    """Without the folders of this machine, which no result is to name."""
    return re.sub(r"(?<![\w.~])/(?:[\w.+@=-]+/)+", "", text)


def context_is_lost() -> bool:
    """Whether nothing more will run on this process's GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# ---- the parent's side ------------------------------------------------------------------------------------


_running: set[subprocess.Popen[bytes]] = set()


class Lines:
    """The lines of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def fresh(self) -> list[Row]:
        """Those that were finished since the last call."""
        if not self._path.exists():
            return []
        with self._path.open() as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._at += len(whole.encode())
        return [json.loads(line) for line in whole.splitlines()]


def run_child(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    until: float,
    watch: Callable[[], None] = lambda: None,
) -> int | None:
    """Run `command` with its output in `log`; its exit code, or None where it was ended `GRACE` after
    `until`.

    `watch` is called a few times a second. The child's own children end with it.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    _running.add(child)
    try:
        while child.poll() is None and time.time() < until + GRACE:
            watch()
            time.sleep(0.1)
        return child.poll()
    finally:
        _end(child)
        child.wait()
        _running.discard(child)
        watch()


def end_children() -> None:
    """End those of every thread."""
    for child in list(_running):
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def ending(code: int | None, log: Path, lines: int = 3) -> str:
    """Why a child ended, from its exit code and the last lines of its log."""
    if code is None:
        return "out of time"
    found = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return plain(" / ".join(line.strip() for line in found[-lines:]))[-400:]
