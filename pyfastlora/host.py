"""Loops over data that need neither torch nor a GPU: compiled from csrc/host.cpp, each also in Python.

The compiled module is built by the first call. Where it cannot be had, the Python versions run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pyfastlora import _jit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger("pyfastlora")

# The names of Linux's /proc/cpuinfo.
X86_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)


def cpu_features() -> dict[str, bool]:
    """Which x86 instruction sets this CPU has and its operating system lets programs use.

    Keys are `X86_FEATURES`. Empty: the CPU is not an x86 one, or there is no way to tell.
    """
    module = compiled()
    return module.cpu_features() if module else cpu_features_reference()


def cpu_features_reference(cpuinfo: str = "/proc/cpuinfo") -> dict[str, bool]:
    """`cpu_features` without the compiled module: what Linux says, else nothing."""
    if platform.machine() not in ("x86_64", "i386", "i686"):
        return {}
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return {}
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return {} if flags is None else {name: name in flags for name in X86_FEATURES}


def best_fit(lengths: NDArray[np.int64], capacity: int, most: int = 0) -> NDArray[np.int64]:
    """The row [N] of each of N samples, so that the lengths in a row add up to at most `capacity`.

    Best-fit decreasing (Johnson 1973): the longest sample first, those of one length in the order given,
    each into the row with the least room that has enough, of several the one that came to that room last, or
    into a new row. At most `most` samples to a row; 0: any number. Raises ValueError for lengths that are not
    a vector of numbers from 1 to `capacity`.
    """
    import numpy as np

    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
        found = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"best_fit: lengths must be a vector of integers; got {found}")
    if capacity < 1:
        raise ValueError(f"best_fit: capacity must be at least 1; got {capacity}")
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"best_fit: lengths must be from 1 to capacity {capacity}; got {lengths.min()} to {lengths.max()}"
        )
    module = compiled()
    run = module.best_fit if module else best_fit_reference
    rows: NDArray[np.int64] = run(lengths.astype(np.int64), capacity, most)
    return rows


def best_fit_reference(lengths: NDArray[np.int64], capacity: int, most: int) -> NDArray[np.int64]:
    """`best_fit` without the compiled module: the same rows, some fifty times slower."""
    import numpy as np

    rows = np.empty(len(lengths), np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their room
    rooms = 0  # a bit for each room that some row has
    documents: list[int] = []
    sizes: list[int] = lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        fitting = rooms >> sizes[i]
        if fitting:
            room = sizes[i] + (fitting & -fitting).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(documents)
            documents.append(0)
        rows[i] = row
        room -= sizes[i]
        documents[row] += 1
        if room and documents[row] != most:
            waiting[room].append(row)
            rooms |= 1 << room
    return rows


def compiled() -> ModuleType | None:
    """The compiled module, or None with the reason in `why_not()`."""
    return _module()[0]


def why_not() -> str | None:
    """Why the compiled module cannot be used, in one sentence, or None. The first call loads or builds it."""
    return _module()[1]


def library() -> Path | None:
    """The file of the compiled module; None where there is none."""
    module = compiled()
    return Path(module.__file__) if module and module.__file__ else None


def recipe() -> _jit.Recipe:
    """How the module for the running Python is made."""
    import pybind11

    flags = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return _jit.Recipe(
        name="host-module",
        library=f"_host{suffix}",
        sources=(_jit.csrc() / "host.cpp",),
        headers=(),
        flags=flags,
        link=("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",),
        flavour=f"{suffix} pybind11 {pybind11.__version__}",
        compile=_compile,
    )


@functools.cache
def _module() -> tuple[ModuleType | None, str | None]:
    if os.name != "posix":
        return None, "not built: needs Linux or macOS"
    try:
        return _jit.obtain(recipe(), _load), None
    except ImportError as error:
        return None, f"not built: {error}; run `pip install pybind11`"
    except _jit.BuildError as error:
        logger.info("pyfastlora's host-module: %s", error.report)
        return None, str(error)


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyfastlora._host", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
    import pybind11

    include = [pybind11.get_include(), sysconfig.get_path("include")]
    _jit.compile_directly(recipe, compiler, directory, include)
