"""`fastlora init`."""

from __future__ import annotations

import click

from pyfastlora.cli._user_errors import mistakes_reported


@click.command()
@click.option("--base-model", required=True, metavar="MODEL", help="A folder, or owner/name on the hub.")
@click.option("--dataset", required=True, metavar="DATA", help="A file, a folder, or owner/name on the hub.")
@click.option(
    "--adapter", type=click.Choice(["lora", "qlora", "dora", "full"]), default="lora", show_default=True
)
@click.option(
    "--type", "type_name", metavar="TYPE", help="What its rows are, instead of what the first looks like."
)
@click.option("-o", "--output", default="cfg.yaml", metavar="FILE", show_default=True, help="A new file.")
def init(base_model: str, dataset: str, adapter: str, type_name: str | None, output: str) -> None:
    """Write a first YAML file for a model and a dataset.

    \b
    fastlora init --base-model ./model --dataset data.jsonl
    fastlora init --base-model Qwen/Qwen2.5-0.5B --dataset chats.jsonl --adapter qlora -o chats.yaml

    The first rows of the dataset decide its type and length, the model's files what is possible; each key has
    a comment. Nothing is loaded.

    \b
    Exit codes: 0 written; 2 a mistake in the command line, or a file that is there already; 3 no type fits
    the dataset; 1 anything else.
    """
    from pathlib import Path

    with mistakes_reported():
        from pyfastlora.trainer.errors import ConfigError
        from pyfastlora.trainer.starter import starter

        if Path(output).exists():
            raise ConfigError(f"--output: {output} is there already; choose another name")
        text = starter(base_model, dataset, adapter, type_name, output)  # type: ignore[arg-type]
        try:
            with Path(output).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
        click.echo(f"{output} is written: look it through, then `fastlora doctor {output}`")
