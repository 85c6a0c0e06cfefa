"""`fastlora`: the list of verbs. A verb's module is imported when it is called, never to print the list."""

from __future__ import annotations

import difflib
import importlib
import logging

import click

from pyfastlora import __version__

# Each name, with _ for -, is also that of the module pyfastlora.cli.<verb> and of the command in it.
VERBS = {
    "init": "Write a first YAML file for a model and a dataset.",
    "train": "Train an adapter as a YAML file describes it.",
    "doctor": "Check a YAML file and all it names before anything is loaded.",
    "plan": "Say how much memory a job needs, and whether it fits.",
    "evaluate": "Measure a model on what its job holds out.",
    "inference": "Ask a model, in the words that it was trained with.",
    "merge-lora": "Merge an adapter into its base: a model that needs no PEFT.",
    "report": "Write the report of a run: one page of HTML that opens anywhere.",
    "preprocess": "Prepare the data of a YAML file, and say what it is like.",
    "convert-config": "Make a file of Axolotl's one of ours.",
    "schema": "Print the keys of a configuration as a JSON schema.",
    "quickstart": "See it work: a small model, real text, a few minutes.",
    "fetch-examples": "Copy the example configurations and scripts to a folder.",
    "build": "Compile the kernels ahead of their first use.",
    "tune": "Time launch configurations on this GPU, and keep the best.",
    "info": "Show what runs on this machine, and why the rest does not.",
    "completion": "Print a script with which a shell completes verbs, options and keys.",
}


class Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"pyfastlora.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # click looks for similar names among the commands that are loaded, which are none.
        if args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean `fastlora {close[0]}`?" if close else f"there are {', '.join(VERBS)}."
            ctx.fail(f"no verb {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


@click.command(cls=Verbs, subcommand_metavar="VERB ...")
@click.version_option(__version__, prog_name="fastlora")
@click.option("--local_rank", "--local-rank", hidden=True, expose_value=False, type=int)  # deepspeed adds it
def main() -> None:
    """Fused LoRA, QLoRA and DoRA training for Hugging Face PEFT models.

    \b
      fastlora quickstart
      fastlora train config.yaml
    """
    # it warns on import of kernels that it could download, for products that ours take over
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
