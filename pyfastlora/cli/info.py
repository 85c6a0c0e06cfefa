"""`fastlora info`: what runs here, what does not and why. Plain text, made to be pasted into an issue."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pyfastlora.ops._registry import Problem

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")


@click.command()
@click.option("--dtype", default="bfloat16", show_default=True, help="The dtype that ops are asked about.")
@click.option("--no-build", is_flag=True, help="Do not compile kernels that are not there yet.")
def info(dtype: str, no_build: bool) -> None:
    """Show what runs on this machine, and why the rest does not.

    \b
      fastlora info
      fastlora info --dtype float16 --no-build

    Prints versions, CPU features, the state of the compiled libraries and, for every op, the implementations
    that take it: the first one named is the one that runs.
    """
    settings = sorted(item for item in os.environ.items() if item[0].startswith("FASTLORA_"))
    if no_build:
        os.environ["FASTLORA_JIT"] = "0"
    problems = _problems(dtype)
    _print("versions", _versions())
    if settings:
        _print("environment", settings)
    _print("CPU", _cpu())
    _print("compiled", _compiled())
    for problem in problems:
        _print(f"ops on {problem}", _ops(problem))


def _versions() -> list[tuple[str, str]]:
    import pyfastlora

    python = f"{platform.python_version()} on {platform.platform()}"
    rows = [("pyfastlora", pyfastlora.__version__), ("python", python)]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _cpu() -> list[tuple[str, str]]:
    from pyfastlora import host
    from pyfastlora.ops import _native

    features = host.cpu_features()
    has = " ".join(name for name, present in features.items() if present) or "none of x86's"
    return [
        ("machine", f"{platform.machine()}, {os.cpu_count()} logical cores"),
        ("features", has if features else "unknown"),
        ("kernels use", _native.cpu_level()),
    ]


def _compiled() -> list[tuple[str, str]]:
    import torch

    from pyfastlora import _cache, _jit, host
    from pyfastlora.ops import _native, _native_gpu

    rows = []
    for name, reason, library in (
        ("kernels", _native.why_not(), _native.library()),
        ("gpu-kernels", _native_gpu.why_not_here(), _native_gpu.library()),
        ("host-module", host.why_not(), host.library()),
    ):
        said = (library and _jit.manifest(library.parent)) or {}
        archs = f", for {', '.join(said['archs'])}" if said.get("archs") else ""
        made = f"{archs}, {said['compiler']}, {said['seconds']} s" if said else ""
        rows.append((name, reason or f"{library}{made}"))
    hip = bool(torch.version.hip)
    toolkit = _native_gpu.find_toolkit(hip)
    rows.append(
        ("hipcc" if hip else "nvcc", f"{toolkit.version}, {toolkit.command}" if toolkit else "not found")
    )
    return [*rows, ("cache", _cache_row(_cache.cache_dirs()))]


def _cache_row(candidates: list[Path]) -> str:
    from pyfastlora import _cache

    refused: list[str] = []
    for directory in candidates:
        exists = next(path for path in (directory, *directory.parents) if path.exists())
        reason = _cache.distrust(directory) if exists == directory else None
        if reason is None and not (exists.is_dir() and os.access(exists, os.W_OK)):
            reason = f"{exists} cannot be written"
        if reason is None:
            return f"{directory} (and not: {'; '.join(refused)})" if refused else str(directory)
        refused.append(reason)
    return f"none: {'; '.join(refused)}"


def _problems(dtype: str) -> list[Problem]:
    import torch

    from pyfastlora.ops import _registry

    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise click.BadParameter(f"{dtype!r} is no dtype of torch, such as bfloat16", param_hint="--dtype")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return [_registry.problem_of(torch.device(device), wanted) for device in devices]


def _ops(problem: Problem) -> list[tuple[str, str]]:
    """A row per op with what takes it, then one per refusal, with the ops concerned unless it is all."""
    from pyfastlora.ops import _registry

    rows = []
    refusals: dict[tuple[str, str], list[str]] = {}
    every = _registry.all_ops()
    for op in every:
        candidates = op.candidates(problem)
        rows.append((op.name, ", ".join(name for name, reason in candidates if reason is None)))
        for name, reason in candidates:
            if reason is not None:
                refusals.setdefault((name, reason), []).append(op.name)
    for (name, reason), ops in refusals.items():
        concerned = "" if len(ops) == len(every) else f" ({', '.join(ops)})"
        rows.append((f"not {name}", reason + concerned))
    return rows


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    click.echo(title)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"  {name:<{width}}  {text}")
