"""`fastlora build`: compile now what would otherwise be compiled by its first use."""

from __future__ import annotations

import time

import click


@click.command()
@click.option("--force", is_flag=True, help="Compile again even where the result is there already.")
def build(force: bool) -> None:
    """Compile the kernels ahead of their first use.

    \b
      fastlora build
      FASTLORA_CACHE=/opt/fastlora fastlora build   (into an image, or for a cluster)

    Prints where each library is and how long it took. The kernels fit every torch from 2.11 on that is of the
    same flavour (CPU, CUDA major, HIP major).
    """
    from pyfastlora import _jit, host
    from pyfastlora.ops import _native

    for recipe in (_native.recipe(), host.recipe()):
        started = time.perf_counter()
        compiler = _jit.find_compiler()
        there = None if force else next(_jit.find(recipe, compiler), None)
        try:
            library = there or _jit.build(recipe, force=force)
        except _jit.BuildError as error:
            raise click.ClickException(f"{recipe.name}: {error.report}") from None
        took = "was there" if there else f"built in {time.perf_counter() - started:.1f} s"
        click.echo(f"{recipe.name}: {library} ({took})")
    for name, reason in (("kernels", _native.why_not()), ("host-module", host.why_not())):
        if reason:
            raise click.ClickException(f"{name}: {reason}")
