"""`python -m bench.report`: tables and plots from the JSON files, and the figures of the project's README."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from bench._results import HOME, KINDS, Results
from bench._sections import page, readme_block

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def gather(files: Sequence[Path]) -> dict[Path, dict[str, Results]]:
    """Results by folder and kind. Raises ValueError for a file that is none, or a second of its kind."""
    found: dict[Path, dict[str, Results]] = {}
    for file in files:
        results = Results.read(file)
        by_kind = found.setdefault(file.parent, {})
        if results.kind in by_kind:
            raise ValueError(f"{file}: a second file of kind {results.kind} in its folder; a page shows one")
        by_kind[results.kind] = results
    ordered = sorted(found.items())
    return {folder: {kind: by_kind[kind] for kind in KINDS if kind in by_kind} for folder, by_kind in ordered}


def write(folder: Path, found: dict[str, Results]) -> list[Path]:
    """README.md and the PNGs of one machine's folder; without matplotlib, the page that says so."""
    from bench._plots import draw

    note = ""
    try:
        plots = {kind: draw(results, folder) for kind, results in found.items() if results.rows}
    except ImportError as error:
        plots, note = {}, f"\nThe plots are left out: {error}.\n"
    readme = folder / "README.md"
    readme.write_text(page(found, plots) + note)
    return [readme, *(folder / name for names in plots.values() for name in names)]


def with_figures(path: Path, found: dict[Path, dict[str, Results]]) -> str:
    """The file's text with the current figures between its marks. Raises ValueError where it has none."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path}: needs {BEGIN} and, after it, {END}, once each")
    pages = {_link(folder, path): by_kind for folder, by_kind in found.items()}
    return f"{before}{BEGIN}\n\n{readme_block(pages)}\n\n{END}{after}"


def _link(folder: Path, readme: Path) -> str:
    """From the README to a machine's page."""
    return Path(os.path.relpath(folder / "README.md", readme.parent)).as_posix()


@click.command()
@click.argument("files", nargs=-1, type=FILE)
@click.option("--readme", type=FILE, help="Rewrite its figures.")
@click.option("--check-readme", "check", type=FILE, help="Compare its figures, change nothing.")
def main(files: tuple[Path, ...], readme: Path | None, check: Path | None) -> None:
    """Make README.md and PNGs beside each JSON file of a benchmark.

    \b
      python -m bench.report
      python -m bench.report --readme README.md

    Without FILES: every one under bench/results. --readme also writes the figures between the two bench
    marks of that file; --check-readme ends with 1 where they are not those of the results.
    """
    try:
        found = gather(files or sorted(HOME.glob("*/*.json")))
        if not found:
            raise ValueError(f"no results under {HOME}: run python -m bench.adapter_tax")
        fresh = {path: with_figures(path, found) for path in (readme, check) if path}
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if check:
        if fresh[check] != check.read_text():
            raise click.ClickException(
                f"{check}: its figures are not those of the results; --readme writes them"
            )
        return
    for folder, by_kind in found.items():
        for path in write(folder, by_kind):
            click.echo(path)
    if readme:
        readme.write_text(fresh[readme])
        click.echo(readme)


if __name__ == "__main__":
    main()
