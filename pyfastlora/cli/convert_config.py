"""`fastlora convert-config`."""

from __future__ import annotations

import click

from pyfastlora.cli._user_errors import mistakes_reported


@click.command(name="convert-config")
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("-o", "--output", metavar="FILE", type=click.Path(), help="Where to write it (stdout).")
def convert_config(config: str, output: str | None) -> None:
    """Make a file of Axolotl's one of ours.

    \b
    fastlora convert-config axolotl.yaml -o cfg.yaml

    Keys with another name here are renamed, keys that cannot be had commented out with the reason; the rest
    stays as it is, comments too. What was changed, and what is still wrong, is said on stderr.

    \b
    Exit codes: 0 the new file is valid; 2 it is written, and still has mistakes, or could not be written.
    """
    from pathlib import Path

    with mistakes_reported():
        from pyfastlora.trainer.config.convert import convert
        from pyfastlora.trainer.config.load import check_text
        from pyfastlora.trainer.errors import ConfigError

        if output is not None and Path(output).exists():
            raise ConfigError(f"--output: {output} is there already; choose another name")
        converted = convert(config)
        for change in converted.changes:
            click.echo(change, err=True)
        if output is None:
            click.echo(converted.text, nl=False)
        else:
            try:
                Path(output).write_text(converted.text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
        check_text(converted.text, output or config)
