"""`fastlora quickstart`."""

from __future__ import annotations

import click

from pyfastlora.cli._threads import give_way
from pyfastlora.cli._user_errors import mistakes_reported


@click.command()
@click.option("--adapter", type=click.Choice(["lora", "qlora", "dora"]), default="lora", show_default=True)
@click.option("--dir", "folder", metavar="DIR", help="A new or empty folder.  [default: quickstart/ADAPTER]")
def quickstart(adapter: str, folder: str | None) -> None:
    """See it work: a small model, real text, a few minutes.

    \b
      fastlora quickstart
      fastlora quickstart --adapter qlora --dir /tmp/first-run

    Nothing is downloaded. A small Llama learns Python from the sources of this Python's standard library
    (once, it is cached); then `fastlora train` teaches it to say what a function does. Printed: the
    held-out loss before and after, answers before and after, which modules were fused, and the speed with
    and without pyfastlora. DIR gets the configuration to play with, the adapter and the curves.
    """
    give_way()
    with mistakes_reported():
        from pathlib import Path

        from pyfastlora.trainer.console import Console
        from pyfastlora.trainer.quickstart.tour import Options, run

        run(Options(adapter, Path(folder) if folder else None), Console())  # type: ignore[arg-type]
