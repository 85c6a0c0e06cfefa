"""Triton's kernels, found when an op first needs them: Triton is slow to import and may be missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyfastlora
from pyfastlora.ops._registry import FLOATS, Implementation, Problem

PACKAGE = "pyfastlora.kernels_triton"


def _find_package(root: Path) -> None:
    """Let PACKAGE be `root`'s kernels_triton, where `root` is a checkout that is on the path and not, or not
    this one of several, installed. A wheel has the package inside pyfastlora.
    """
    folder = root / "kernels_triton"
    if PACKAGE in sys.modules or (root / "pyfastlora" / "kernels_triton").is_dir() or not folder.is_dir():
        return
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    sys.modules[PACKAGE] = package
    pyfastlora.kernels_triton = package


# When the ops are imported, and not when one is first used: others import kernels_triton by its name.
_find_package(Path(pyfastlora.__file__).parents[1])


def triton_implementation(stem: str, name: str) -> Implementation:
    """The launcher `name` of kernels_triton/<stem>.py as the implementation `triton`."""
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return found[0](*args)
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return found[0](*args)

    def why_not(problem: Problem) -> str | None:
        if reason := why_not_triton(problem):
            return reason
        if not found:  # here and not in `run`, which torch.compile traces: it cannot trace an import
            try:
                found.append(getattr(importlib.import_module(f"{PACKAGE}.{stem}"), name))
            except ImportError as error:
                return f"does not import: {error}"
        return None

    return Implementation("triton", run, why_not)


def why_not_triton(problem: Problem) -> str | None:
    """Objections of every Triton kernel. In Triton's interpreter (TRITON_INTERPRET=1) CPU tensors will do."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device != "cuda" and not (interpreted and problem.device == "cpu"):
        return f"needs GPU tensors; these are on {problem.device}"
    if problem.arch.startswith("sm_") and int(problem.arch[3:]) < 80:
        return f"needs sm_80 or later, for bfloat16 products; this is {problem.arch}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install pyfastlora[triton]"
    if not interpreted and (missing := _missing()):
        return missing
    if problem.dtype not in FLOATS:
        return f"has {', '.join(FLOATS)}; this is {problem.dtype}"
    return None


@functools.cache
def _missing() -> str | None:
    """What Triton lacks to compile the C code that launches its kernels."""
    named = os.environ.get("CC", "").split()[:1]
    if not any(shutil.which(compiler) for compiler in named or ("gcc", "clang")):
        return "needs a C compiler: install gcc"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "needs Python's headers: install python3-dev"
    return None
