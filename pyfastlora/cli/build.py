"""`fastlora build`: compile now what would otherwise be compiled by its first use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pyfastlora._jit import Recipe


@click.command()
@click.option("--force", is_flag=True, help="Compile again even where the result is there already.")
@click.option("--archs", help="GPUs to compile for, such as 80,90 or gfx942; also where there is no GPU.")
def build(force: bool, archs: str | None) -> None:
    """Compile the kernels ahead of their first use.

    \b
      fastlora build
      fastlora build --archs 80,90
      FASTLORA_CACHE=/opt/fastlora fastlora build   (into an image, or for a cluster)

    Prints where each library is and how long it took. The kernels fit every torch from 2.11 on that is of the
    same flavour (CPU, CUDA major, HIP major). Those of the GPU are compiled for the GPUs of this machine, or
    for --archs (FASTLORA_ARCHS), which needs nvcc or hipcc but neither a GPU nor a torch that can use one.
    Where neither names any and there is no nvcc, they are left out, and Triton's kernels run instead. Without
    pybind11 the host module is left out, and its loops run in Python.
    """
    from pyfastlora import host
    from pyfastlora.ops import _native

    _compile(_native.recipe(), force)
    if recipe := _gpu_recipe(archs):
        _compile(recipe, force)
    try:
        _compile(host.recipe(), force)
    except ImportError as error:
        click.echo(f"host-module: left out: {error}; run `pip install pybind11`")
    else:
        _must_load("host-module", host.why_not())
    _must_load("kernels", _native.why_not())


def _must_load(name: str, reason: str | None) -> None:
    if reason:
        raise click.ClickException(f"{name}: {reason}")


def _gpu_recipe(archs: str | None) -> Recipe | None:
    """Of the GPU kernels, where they were asked for or torch can use them."""
    import os

    import torch

    from pyfastlora.ops import _native_gpu

    if not (archs or os.environ.get("FASTLORA_ARCHS")):
        if not (torch.version.cuda or torch.version.hip):
            return None
        if _native_gpu.find_toolkit(hip=bool(torch.version.hip)) is None:
            click.echo(f"gpu-kernels: left out: no {'hipcc' if torch.version.hip else 'nvcc'} was found")
            return None
    try:
        return _native_gpu.recipe(_native_gpu.parse_archs(archs) if archs else _native_gpu.wanted_archs())
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def _compile(recipe: Recipe, force: bool) -> None:
    from pyfastlora import _jit

    started = time.perf_counter()
    there = None if force else next(_jit.find(recipe, _jit.find_compiler()), None)
    try:
        library = there or _jit.build(recipe, force=force)
    except _jit.BuildError as error:
        raise click.ClickException(f"{recipe.name}: {error.report}") from None
    took = "was there" if there else f"built in {time.perf_counter() - started:.1f} s"
    archs = f" for {', '.join(recipe.archs)}" if recipe.archs else ""
    click.echo(f"{recipe.name}{archs}: {library} ({took})")
