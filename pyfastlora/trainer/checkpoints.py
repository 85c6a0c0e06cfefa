"""Checkpoints on disk: `checkpoint-N` in the run directory, there whole or not at all.

A checkpoint is written to a hidden folder, flushed to the disk and renamed; a rename deletes it, too. So a
process that is killed at any moment leaves hidden folders behind at worst, which the next run removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyfastlora.trainer.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _DELETED = ".unfinished", ".deleted"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint; -1 for a folder that is none."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """Of a run, oldest first."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if p.is_dir() and step_of(p) >= 0), key=step_of)


@contextmanager
def writing(run_dir: Path, step: int, is_first: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A folder to write into; it becomes checkpoint-`step` when the with block ends.

    Every process of a run enters; the first one makes the folder and renames it, between barriers. Raises
    UserError where the disk is full; what was there before stays as it was.
    """
    final = run_dir / f"checkpoint-{step}"
    folder = _hidden(final, _UNFINISHED)
    try:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        barrier()
        yield folder
        barrier()
        if is_first:
            for path in (*folder.rglob("*"), folder):
                _flush(path)
            delete(final)  # the same step, saved again
            folder.rename(final)
            _flush(run_dir)
        barrier()
    except Exception as error:
        if (why := no_room(error)) is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        before = checkpoints(run_dir)
        left = f"{before[-1].name} is whole" if before else "no earlier one is there"
        raise UserError(
            f"{final} could not be written ({why}); {left}. Make room, or keep fewer (save_total_limit), "
            "and go on with --resume auto"
        ) from error


def rotate(run_dir: Path, limit: int | None, best: Path | None) -> None:
    """Deletes the oldest checkpoints until `limit` are left; never the best, nor the newest one."""
    there = checkpoints(run_dir)
    surplus = 0 if limit is None else len(there) - limit
    for checkpoint in [c for c in there[:-1] if c != best][: max(0, surplus)]:
        delete(checkpoint)


def delete(checkpoint: Path) -> None:
    """Removes a checkpoint so that no half of it is ever found."""
    if checkpoint.exists():
        gone = _hidden(checkpoint, _DELETED)
        shutil.rmtree(gone, ignore_errors=True)
        checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def clean(run_dir: Path) -> None:
    """Removes what killed processes left half written or half deleted."""
    for suffix in (_UNFINISHED, _DELETED):
        for folder in run_dir.glob(f".checkpoint-*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}{suffix}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_room(error: BaseException) -> str | None:
    """The system's word for a full disk, where that is the error; torch and safetensors wrap it in theirs."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _NO_ROOM else None
    words = [os.strerror(code) for code in _NO_ROOM]
    found = next((word for word in words if word in str(error)), None)
    # torch's writer of zip files drops the reason
    return found or ("the disk took only a part" if "PytorchStreamWriter failed" in str(error) else None)
