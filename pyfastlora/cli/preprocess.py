"""`fastlora preprocess`."""

from __future__ import annotations

import click

from pyfastlora.cli._flags import as_overrides, keyed, takes_config
from pyfastlora.cli._user_errors import mistakes_reported


@keyed()
@takes_config
@click.option("--show", default=0, metavar="N", help="Print so many samples, what is trained on in colour.")
@click.option("--report", metavar="DIR", type=click.Path(), help="Write report.json and lengths.png there.")
def preprocess(
    ctx: click.Context, config: str, overrides: tuple[str, ...], show: int, report: str | None
) -> None:
    """Prepare the data of a YAML file, and say what it is like.

    \b
    fastlora preprocess cfg.yaml --show 3
    fastlora preprocess cfg.yaml --report ./data-report

    Rows are read, written out by their type and tokenised, into dataset_prepared_path (default: the cache),
    where `fastlora train` finds them as long as nothing that shapes them changes.

    \b
    Exit codes: 0 prepared; 2 a mistake in the command line or the file; 3 a dataset is missing or malformed;
    1 anything else, such as a missing tokenizer.
    """
    overrides = (*overrides, *as_overrides(ctx.args))
    with mistakes_reported():
        from pyfastlora.trainer.config.load import load_config
        from pyfastlora.trainer.console import Console

        loaded = load_config(config, overrides)
        from pyfastlora.trainer.preprocess import preprocess as run

        run(loaded, Console(), show, report)
