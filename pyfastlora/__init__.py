"""Fused LoRA, QLoRA and DoRA for Hugging Face PEFT models.

    import pyfastlora
    print(pyfastlora.patch(model))  # any PEFT model; pyfastlora.unpatch(model) undoes it

Importing this package imports neither torch nor any kernel: the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfastlora import ops as ops
    from pyfastlora.ops._registry import backend as backend
    from pyfastlora.patching.apply import patch as patch
    from pyfastlora.patching.apply import report as report
    from pyfastlora.patching.apply import unpatch as unpatch
    from pyfastlora.patching.report import PatchReport as PatchReport

__version__ = "0.1.0"

_HOME = {
    "PatchReport": "pyfastlora.patching",
    "backend": "pyfastlora.ops._registry",
    "patch": "pyfastlora.patching",
    "report": "pyfastlora.patching",
    "unpatch": "pyfastlora.patching",
}

__all__ = ["PatchReport", "__version__", "backend", "ops", "patch", "report", "unpatch"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("pyfastlora.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'pyfastlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
