"""`fastlora schema`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--field", metavar="KEY", help="One key's part of it.")
def schema(field: str | None) -> None:
    """Print the keys of a configuration as a JSON schema.

    Editors check YAML against it while it is written.

    \b
    fastlora schema > fastlora.schema.json
    fastlora schema --field lora_r
    """
    import difflib

    from pyfastlora.trainer.config import Config

    whole = Config.model_json_schema()
    if field is None:
        click.echo(json.dumps(whole, indent=2))
        return
    found = whole["properties"].get(field)
    if found is None:
        close = difflib.get_close_matches(field, whole["properties"], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise click.UsageError(f"--field {field}: unknown key{hint}")
    click.echo(json.dumps(found, indent=2))
