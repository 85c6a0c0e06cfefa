"""`fastlora merge-lora`."""

from __future__ import annotations

import click

from pyfastlora.cli._flags import as_overrides, keyed, takes_config
from pyfastlora.cli._user_errors import mistakes_reported


@keyed(name="merge-lora")
@takes_config
@click.option("--adapter", "adapters", multiple=True, metavar="DIR", help="Not output_dir's; repeatable.")
@click.option("--checkpoint", type=int, metavar="N", help="The adapter of output_dir/checkpoint-N.")
@click.option("--weights", metavar="W,W..", help="How much of each --adapter (1).")
@click.option("--dequant/--no-dequant", default=None, help="Of a quantised base: see above (--dequant).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Not that of the base.")
@click.option("-o", "--output", metavar="DIR", help="A new or empty folder (output_dir/merged).")
def merge_lora(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    adapters: tuple[str, ...],
    checkpoint: int | None,
    weights: str | None,
    dequant: bool | None,
    dtype: str | None,
    output: str | None,
) -> None:
    """Merge an adapter into its base: a model that needs no PEFT.

    \b
    fastlora merge-lora cfg.yaml
    fastlora merge-lora cfg.yaml --checkpoint 200 -o ./model
    fastlora merge-lora cfg.yaml --adapter ./a --adapter ./b --weights 0.7,0.3

    The sum is taken in float32 and rounded once to the dtype of the base. A 4-bit or 8-bit base is
    dequantised (--dequant): its values are those that the adapter was trained on. --no-dequant merges into
    the base's own weights instead, with which the adapter answers a little differently. Several adapters
    are added up, each times its weight. Before anything is written, the logits of the merged model are
    compared with the adapter's.

    \b
    Exit codes: 0 merged; 2 a mistake in the command line or the file, or a folder that is used; 1 anything
    else, such as logits that differ.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    with mistakes_reported():
        from pyfastlora.trainer.config.load import load_config
        from pyfastlora.trainer.console import Console
        from pyfastlora.trainer.errors import ConfigError

        loaded = load_config(config, overrides)
        try:
            shares = tuple(float(weight) for weight in weights.split(",")) if weights else ()
        except ValueError:
            raise ConfigError(f"--weights must be numbers with commas between; got {weights}") from None
        import torch

        from pyfastlora.trainer.loading import Choice
        from pyfastlora.trainer.merge import Request, merge

        kind = getattr(torch, dtype) if dtype else None
        choice = Choice(adapters=adapters, checkpoint=checkpoint)
        merge(loaded, Request(choice, shares, dequant, kind, output), Console())
