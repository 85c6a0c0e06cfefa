"""`fastlora fetch-examples`."""

from __future__ import annotations

from pathlib import Path

import click

from pyfastlora.cli._user_errors import mistakes_reported


@click.command(name="fetch-examples")
@click.argument("folder", metavar="[DIR]", default="examples", type=click.Path(file_okay=False))
def fetch_examples(folder: str) -> None:
    """Copy the example configurations and scripts to a folder.

    \b
    fastlora fetch-examples
    fastlora fetch-examples ./first-steps

    They come with the package: nothing is downloaded. README.md says what each of them is. DIR is examples if
    not said; files that are there already are left alone.

    \b
    Exit codes: 0 copied; 2 files of these names are in DIR already, or it cannot be written.
    """
    import shutil

    with mistakes_reported():
        from pyfastlora.trainer.errors import ConfigError

        files, target = examples(), Path(folder)
        there = [file.name for file in files if (target / file.name).exists()]
        if there:
            more = f" and {len(there) - 3} more" if len(there) > 3 else ""
            raise ConfigError(f"{target} has {', '.join(there[:3])}{more} already; choose another folder")
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, target / file.name)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
        click.echo(f"{len(files)} files copied to {target}; {target / 'README.md'} says what they are")


def examples() -> list[Path]:
    """The files of examples/: inside the package when it came as a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "examples" if (package / "examples").is_dir() else package.parent / "examples"
    return sorted(f for f in folder.iterdir() if f.suffix in (".yaml", ".md", ".py"))
