"""`fastlora report`."""

from __future__ import annotations

from pathlib import Path

import click

from pyfastlora.cli._user_errors import mistakes_reported


@click.command()
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Instead of RUN_DIR/report.html."
)
def report(run_dir: Path, output: Path | None) -> None:
    """Write the report of a run: one page of HTML that opens anywhere.

    \b
    fastlora report ./out
    fastlora report ./out --output ./run-7.html

    `fastlora train` writes it at its end, and when it is stopped. This makes it of what is in the folder now:
    of a run that goes on, was killed, or was made by another version.

    \b
    Exit codes: 0 written; 2 RUN_DIR holds no run; 1 anything else.
    """
    with mistakes_reported():
        from pyfastlora.trainer.report import write_report

        click.echo(str(write_report(run_dir, output)))
