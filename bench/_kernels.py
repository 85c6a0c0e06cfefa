"""The sources of the GPU kernels, compiled to be read, not run: the common part of `hardware_cuda` and
`hardware_hip`.

What was read off a file is kept under build/kernels by a hash of all that it depends on, so that only what
changed is compiled again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench._environment import ROOT
from pyfastlora._jit import CompileError

Row = dict[str, Any]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "kernels"


def sources() -> list[Path]:
    """Every file of kernels."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def read_each(
    files: Sequence[Path], made_by: str, read: Callable[[Path, Path], list[Row]]
) -> dict[Path, list[Row] | CompileError]:
    """`read(file, folder)` of every file, MAX_JOBS at a time; or what it gave when all was as it is now.

    made_by: the compiler and its flags. The folder is fresh and goes afterwards.
    """

    def outcome(file: Path) -> list[Row] | CompileError:
        try:
            return _kept_or_read(file, made_by, read)
        except CompileError as error:
            return error

    # The longest first: started last, one would finish alone.
    order = sorted(files, key=lambda file: -file.stat().st_size)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        done = dict(zip(order, pool.map(outcome, order), strict=True))
    return {file: done[file] for file in files}


def _kept_or_read(file: Path, made_by: str, read: Callable[[Path, Path], list[Row]]) -> list[Row]:
    module = inspect.getsourcefile(read)
    assert module is not None
    digest = hashlib.sha256(made_by.encode())
    for part in (file, *sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").glob("*.h")), Path(module)):
        digest.update(part.read_bytes())
    path = KEPT / f"{Path(module).stem}-{file.stem}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            fresh = Path(folder) / path.name
            fresh.write_text(json.dumps(read(file, Path(folder))))
            os.replace(fresh, path)
    rows: list[Row] = json.loads(path.read_text())
    return rows


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """What a program prints. Raises CompileError."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if done.returncode:
        raise CompileError(done.stdout + done.stderr)
    return done.stdout


def plain_names(mangled: Sequence[str]) -> list[str]:
    """ "dequant_runs<bf16>" for each mangled kernel: without namespace, result and parameters."""
    listed = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [_plain(name) for name in listed]


def _plain(name: str) -> str:
    depth, at = 0, len(name)
    while at:  # back over the parameters, which may hold parentheses themselves
        at -= 1
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            break
    bare = re.sub(r"\b(fastlora|gpu)::|\(fastlora::\w+\)", "", name[:at] if name.endswith(")") else name)
    return bare.removeprefix("void ").removeprefix("static ").strip()


def base(instance: str) -> str:
    """ "dequant_runs" of "dequant_runs<bf16>"."""
    return instance.partition("<")[0]
