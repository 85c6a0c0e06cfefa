"""Where a figure comes from: machine, versions, commit, load. Nothing that names a host, a user or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench._bandwidth import copy_gb_s

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
ROOT = Path(__file__).parents[1]
MEASURED = ("pyfastlora", "csrc", "kernels_triton", "bench/*.py")  # what a figure depends on


def environment() -> dict[str, Any]:
    """JSON-ready. Loads (or builds) the compiled kernels, so that this happens before anything is timed."""
    import torch

    import pyfastlora
    from pyfastlora import host
    from pyfastlora.ops import _native

    threads = torch.get_num_threads()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": cores(),
        "threads": threads,
        "features": [name for name, present in host.cpu_features().items() if present],
        "memory_gb": _memory_gb(),
        "kernels": _native.why_not() or _native.cpu_level(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "pyfastlora": pyfastlora.__version__,
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load": load(),
        "copy_gb_s": {str(n): round(copy_gb_s(threads=n), 1) for n in sorted({1, threads})},
    }


def gpu_environment() -> dict[str, Any]:
    """JSON-ready, of the current GPU; of the CPU in its place where there is none."""
    import torch

    import pyfastlora

    there = torch.cuda.is_available()
    chip = torch.cuda.get_device_properties(0) if there else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": chip.name if chip else cpu_model(),
        "arch": f"sm_{chip.major}{chip.minor}"
        if chip and torch.version.cuda
        else getattr(chip, "gcnArchName", ""),
        "multiprocessors": chip.multi_processor_count if chip else 0,
        "memory_gb": round(chip.total_memory / 1e9, 1) if chip else _memory_gb(),
        "l2_mb": round(chip.L2_cache_size / 1e6, 1) if chip else 0,
        "driver": _said(r"([\d.]+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "nvcc": _said(r"V([\d.]+)", "nvcc", "--version"),
        "cpu": cpu_model(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "pyfastlora": pyfastlora.__version__,
        **versions(),
        "commit": _commit(),
        "load": load(),
    }


def versions() -> dict[str, str]:
    """Of the packages that a GPU's figures depend on."""
    return {name: _version(name) for name in (*PACKAGES, "triton", "liger-kernel")}


def load() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes; empty where the system does not say."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def cores() -> int:
    """Logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: str = "/proc/cpuinfo") -> str:
    """As the CPU, or the hypervisor in front of it, calls itself."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def slug(found: dict[str, Any]) -> str:
    """The folder of a machine's results: "amd-epyc-9r45-avx512-2-cores"; a hypervisor may hide a level."""
    name = re.sub(
        r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|\d+-Core\b|@.*", " ", found["cpu"], flags=re.IGNORECASE
    )
    words = re.findall(r"[a-z0-9]+", name.lower()) or [found["architecture"]]
    words += re.findall(r"^\w+$", found["kernels"])  # not where it says why there are none
    return "-".join([*words, str(found["cores"]), "core" if found["cores"] == 1 else "cores"])


def gpu_slug(found: dict[str, Any]) -> str:
    """The folder of a GPU's results: "nvidia-h200"."""
    return "-".join(re.findall(r"[a-z0-9]+", found["gpu"].lower())) or "gpu"


def _said(pattern: str, *command: str) -> str:
    """What a program's output has for the pattern; "unknown" without it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(pattern, done.stdout)
    return match[1] if match else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout, with "+" where tracked files of the library or the benchmarks differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
