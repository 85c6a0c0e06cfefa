"""Triton's kernels, found when an op first needs them: Triton is slow to import and may be missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from pyfastlora.ops._registry import FLOATS, Implementation, Problem


def triton_implementation(stem: str, name: str) -> Implementation:
    """The launcher `name` of kernels_triton/<stem>.py as the implementation `triton`."""
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"pyfastlora.kernels_triton.{stem}"), name))
        return found[0](*args)

    return Implementation("triton", run, why_not_triton)


def why_not_triton(problem: Problem) -> str | None:
    """Objections of every Triton kernel."""
    if problem.device not in ("cuda", "xpu"):
        return f"needs GPU tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install pyfastlora[triton]"
    if problem.dtype not in FLOATS:
        return f"has {', '.join(FLOATS)}; this is {problem.dtype}"
    return None
