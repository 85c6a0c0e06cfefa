"""The cache: folders that are made once and appear whole, for libraries, base models and prepared data.

    lock -> look again -> make in a fresh .build-* folder beside it -> publish by renaming the folder

A lock dies with its process and a folder appears whole or not at all: what was killed leaves nothing that a
later one can trip over, and of many processes that start cold one makes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ABANDONED = 24 * 3600  # seconds after which a .build-* folder has no process behind it


class UnwritableError(OSError):
    """None of the folders can be written; the text says why, of each."""


def cache_dirs() -> list[Path]:
    """The cache, then one that is private to the user, for when the first cannot be written."""
    if named := os.environ.get("FASTLORA_CACHE"):
        cache = Path(named)
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pyfastlora"
    try:
        return [cache.absolute(), Path(tempfile.gettempdir()) / f"pyfastlora-{os.getuid()}"]
    except FileNotFoundError:  # no directory for temporary files can be written either
        return [cache.absolute()]


def distrust(path: Path) -> str | None:
    """Why nothing under `path` may be loaded, or None. Root is trusted, as it can replace anything anyway."""
    if path.is_symlink() and path.parent.stat().st_mode & stat.S_IWOTH:
        return f"{path} is a link in a directory where anybody can make one"
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a directory"
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {found.st_uid})"
    return f"{path} can be written by anybody" if found.st_mode & stat.S_IWOTH else None


def obtain(directories: Sequence[Path], name: str, marker: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in one of the directories: as it is found, or made in the first that can be written.

    make(folder) fills an empty folder; the file `marker` in it says that it is whole, and is the last to be
    written. Raises UnwritableError, and what `make` raises.
    """
    for directory in directories:
        entry = directory / name
        if (entry / marker).is_file() and not (distrust(directory) or distrust(entry)):
            return entry
    refused = []
    for directory in directories:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := distrust(directory):
                refused.append(reason)
                continue
            workplace = Path(tempfile.mkdtemp(prefix=".build-", dir=directory))
        except OSError as error:
            refused.append(f"{directory}: {error.strerror}")
            continue
        try:
            sweep(directory)
            with locked(directory / f".{name}.lock"):
                if not (directory / name / marker).is_file():
                    make(workplace)
                    _publish(workplace, directory / name, marker)
                return directory / name
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
            with contextlib.suppress(OSError):  # whoever waits for it holds the file, and looks again
                (directory / f".{name}.lock").unlink()
    raise UnwritableError("; ".join(refused))


def _publish(workplace: Path, entry: Path, marker: str) -> None:
    try:
        os.rename(workplace, entry)
    except OSError:
        if (entry / marker).is_file():
            return  # without locks another process was first, and its result is as good
        shutil.rmtree(entry, ignore_errors=True)  # half of one, from a disk that lost the rest
        os.rename(workplace, entry)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among processes for the time of a with block."""
    import fcntl

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Then two may make it, and the rename keeps one result.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def sweep(directory: Path) -> None:
    """Remove what killed processes left behind, once nothing can still be using it."""
    for left in directory.glob(".build-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)
