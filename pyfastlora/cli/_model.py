"""Which model of a job a command is about, as options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pyfastlora.cli._flags import as_overrides

if TYPE_CHECKING:
    from pyfastlora.trainer.config.load import LoadedConfig
    from pyfastlora.trainer.loading import Choice

_OPTIONS = (
    click.option("--base", is_flag=True, help="The base without adapter."),
    click.option("--adapter", metavar="DIR", help="An adapter elsewhere than in output_dir."),
    click.option("--checkpoint", type=int, metavar="N", help="What output_dir/checkpoint-N holds."),
    click.option(
        "--merged", is_flag=False, flag_value="", metavar="[DIR]", help="A merged model (output_dir/merged)."
    ),
)


def chooses_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options base, adapter, checkpoint and merged."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def loaded_with_choice(
    ctx: click.Context, config: str, overrides: tuple[str, ...]
) -> tuple[LoadedConfig, Choice]:
    """The configuration and the choice that a command was given."""
    from pyfastlora.trainer.config.load import load_config

    loaded = load_config(config, (*overrides, *as_overrides(ctx.args)))
    from pyfastlora.trainer.loading import Choice

    given = ctx.params
    adapters = (given["adapter"],) if given["adapter"] else ()
    return loaded, Choice(given["base"], adapters, given["checkpoint"], given["merged"])
