"""`fastlora doctor`."""

from __future__ import annotations

import os

import click

from pyfastlora.cli._flags import as_overrides, keyed, takes_config


@keyed()
@takes_config
def doctor(ctx: click.Context, config: str, overrides: tuple[str, ...]) -> None:
    """Check a YAML file and all it names before anything is loaded.

    \b
    fastlora doctor cfg.yaml

    Keys, output folder, packages, machine, attention, model, tokenizer, adapter, disk, and the first rows of
    every dataset: a line for whatever stands in the way, and how to put it right. No weights are read, and
    the hub is not asked unless HF_HUB_OFFLINE=0 is set.

    \b
    Exit codes: 0 nothing stands in the way; 1 it would run, with warnings; 2 it would fail.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported
    from pyfastlora.trainer.console import Console
    from pyfastlora.trainer.doctor import examine

    report = examine(config, overrides)
    report.say(Console())
    ctx.exit(report.exit_code)
