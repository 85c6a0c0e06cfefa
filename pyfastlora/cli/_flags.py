"""Keys of a configuration as options of a command: `--learning-rate 2e-4`, `--lora_r=32`."""

from __future__ import annotations

from collections.abc import Sequence

import click

#: Of a click command: what it does not know is left for `as_overrides`.
KEYS_TOO = {"ignore_unknown_options": True, "allow_extra_args": True}


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
