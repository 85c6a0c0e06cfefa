"""`fastlora evaluate`."""

from __future__ import annotations

import json
from typing import Any

import click

from pyfastlora.cli._flags import keyed, takes_config
from pyfastlora.cli._model import chooses_model, loaded_with_choice
from pyfastlora.cli._threads import give_way
from pyfastlora.cli._user_errors import mistakes_reported


@keyed()
@takes_config
@chooses_model
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
def evaluate(
    ctx: click.Context, config: str, overrides: tuple[str, ...], as_json: bool, **model: Any
) -> None:
    """Measure a model on what its job holds out.

    \b
    fastlora evaluate cfg.yaml
    fastlora evaluate cfg.yaml --base
    fastlora evaluate cfg.yaml --checkpoint 200 --json
    fastlora evaluate cfg.yaml --merged --set 'test_datasets=[{path: other.jsonl, type: alpaca}]'

    For each dataset of test_datasets, or of datasets with val_set_size, and in all: the mean loss per trained
    token, which is the trainer's held-out loss, its exponential (perplexity), and the share of tokens that
    are the model's first choice. Without an option the model is what output_dir holds.

    \b
    Exit codes: 0 measured; 2 a mistake in the command line or the file; 3 a dataset is missing or malformed;
    1 anything else.
    """
    give_way()
    with mistakes_reported():
        loaded, choice = loaded_with_choice(ctx, config, overrides)
        from pyfastlora.trainer.console import Console
        from pyfastlora.trainer.evaluation import evaluate as measure
        from pyfastlora.trainer.evaluation import say

        found = measure(loaded, choice, Console(quiet=as_json))
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=2))
        else:
            say(found, Console())
