"""`fastlora train`."""

from __future__ import annotations

import click

from pyfastlora.cli._flags import KEYS_TOO, as_overrides
from pyfastlora.cli._threads import give_way
from pyfastlora.cli._user_errors import mistakes_reported


@click.command(context_settings=KEYS_TOO, options_metavar="[OPTIONS] [--KEY VALUE]...")
@click.argument("config", type=click.Path(dir_okay=False))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the file; repeatable."
)
@click.option("--dry-run", is_flag=True, help="One step on the fullest batch; nothing is left of it.")
@click.pass_context
def train(ctx: click.Context, config: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train an adapter as a YAML file describes it.

    \b
    fastlora train examples/lora.yaml
    fastlora train cfg.yaml --learning-rate 1e-4 --lora_r=32
    fastlora train cfg.yaml --set datasets[0].path=data.jsonl
    fastlora train cfg.yaml --dry-run

    Keys have Axolotl's names; docs/config.md lists them. The adapter lands in output_dir in PEFT's
    format, with the resolved configuration, metrics (log.jsonl) and the kernel report beside it.

    \b
    Exit codes: 0 trained; 2 a mistake in the command line or the file; 3 a dataset is missing or malformed;
    1 anything else, such as a model without weights, or too little memory.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    give_way()
    with mistakes_reported():
        from pyfastlora.trainer.config.load import load_config
        from pyfastlora.trainer.console import Console

        loaded = load_config(config, overrides)
        if dry_run:
            from pyfastlora.trainer.dry_run import dry_run as run_job
        else:
            from pyfastlora.trainer.job import train as run_job  # type: ignore[assignment]
        run_job(loaded, Console())
