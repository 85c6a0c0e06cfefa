"""Keys of a configuration as options of a command: `--learning-rate 2e-4`, `--lora_r=32`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

#: Of a click command: what it does not know is left for `as_overrides`.
KEYS_TOO = {"ignore_unknown_options": True, "allow_extra_args": True}


class Keyed(click.Command):
    """A command to which keys of a configuration are options too, when a shell completes them as well."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("--"):
            return found
        from pyfastlora.trainer.config import Config

        names = {item.value for item in found}
        keys = {f"--{key.replace('_', '-')}": f.description for key, f in Config.model_fields.items()}
        known = [k for k in keys if k.startswith(incomplete.replace("_", "-")) and k not in names]
        return found + [CompletionItem(key, help=keys[key]) for key in known]


#: What makes a function a command with keys: @keyed() instead of @click.command().
keyed = functools.partial(
    click.command, cls=Keyed, context_settings=KEYS_TOO, options_metavar="[OPTIONS] [--KEY VALUE]..."
)


def takes_config(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments `config` and `overrides`, and the context, in which other keys are."""
    change = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the file; repeatable."
    )
    return click.argument("config", type=click.Path(dir_okay=False))(change(click.pass_context(function)))


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """["learning_rate=2e-4", "lora_r=32"] from what stands behind the command's own options.

    Dashes in a key are underscores; keys may be dotted and indexed. Raises click.UsageError for an argument
    that is no option, and for an option without a value.
    """
    found: list[str] = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            raise click.UsageError(f"{option}: one configuration is trained at a time; keys are --key value")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise click.UsageError(f"{option} needs a value, such as {option} true")
            value = rest.pop(0)
        found.append(f"{key.replace('-', '_')}={value}")
    return found
