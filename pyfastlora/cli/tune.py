"""`fastlora tune`: fit the launches of the Triton kernels to this GPU."""

from __future__ import annotations

import re

import click

SHAPES = "512x4096x4096,2048x4096x4096,8192x4096x4096,8192x4096x14336"


@click.command()
@click.option("--ops", "names", help="Ops, by their names in `fastlora info`.  [default: all]")
@click.option(
    "--shapes", default=SHAPES, show_default=True, help="Tokens x inputs x outputs of linear layers."
)
@click.option("--ranks", default="16,64", show_default=True, help="Ranks of the adapters.")
@click.option("--dtypes", default="bfloat16", show_default=True, help="Dtypes of the activations.")
def tune(names: str | None, shapes: str, ranks: str, dtypes: str) -> None:
    """Time launch configurations on this GPU, and keep the best.

    \b
      fastlora tune
      fastlora tune --ops lora_shrink,lora_grad --shapes 4096x2048x8192 --ranks 16

    Prints each op's microseconds before and after, by sizes. The findings go into the cache, beside those of
    earlier runs; the Triton kernels are launched by them from the next process on. Compiled kernels are not
    concerned (`fastlora info` shows which ones run).
    """
    import torch

    from pyfastlora.ops import _registry, _triton, _tune

    chosen = list(_tune.VALUES) if names is None else _words("ops", names, tuple(_tune.VALUES))
    layers = [_layer(shape) for shape in _words("shapes", shapes)]
    kinds = [getattr(torch, name) for name in _words("dtypes", dtypes, _registry.FLOATS)]
    thin = [_rank(rank) for rank in _words("ranks", ranks)]
    if not torch.cuda.is_available():
        raise click.ClickException("tune needs a GPU, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    problem = _registry.problem_of(device, kinds[0])
    if reason := _triton.why_not_triton(problem):
        raise click.ClickException(f"tune times the Triton kernels; triton {reason}")
    every = [_tune.Shape(*layer, rank) for layer in layers for rank in thin]
    for found in _tune.tune(chosen, every, kinds, device):
        settings = " ".join(f"{key}={value}" for key, value in found.config.items())
        times = f"{found.before * 1e6:8.1f} us -> {found.after * 1e6:8.1f} us"
        click.echo(f"{found.op:<14} {found.dtype:<9} {found.bounds:<12} {times}   {settings}")
        try:
            path = _tune.write(
                found, problem.arch
            )  # one by one: a run that is interrupted has not been in vain
        except OSError as error:
            raise click.ClickException(f"not written: {error}") from None
    click.echo(f"written to {path}")


def _words(option: str, text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise click.BadParameter("names nothing", param_hint=f"--{option}")
    for word in words:
        if allowed and word not in allowed:
            raise click.BadParameter(f"{word!r}: choose from {', '.join(allowed)}", param_hint=f"--{option}")
    return words


def _layer(text: str) -> tuple[int, int, int]:
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if sizes is None:
        need = "tokens x inputs x outputs, such as 2048x4096x4096"
        raise click.BadParameter(f"{text!r} is not {need}", param_hint="--shapes")
    return int(sizes[1]), int(sizes[2]), int(sizes[3])


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise click.BadParameter(f"{text!r} is no rank, such as 16", param_hint="--ranks")
    return int(text)
