"""`fastlora completion`."""

from __future__ import annotations

import click

#: Shells read their script from what this prints, and ask `fastlora` for names through this variable.
VARIABLE = "_FASTLORA_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script with which a shell completes verbs, options and keys.

    \b
    eval "$(fastlora completion bash)"      # in ~/.bashrc
    eval "$(fastlora completion zsh)"       # in ~/.zshrc
    fastlora completion fish > ~/.config/fish/completions/fastlora.fish

    Then TAB completes verbs, their options, files, and behind -- the keys of a configuration.
    """
    from click.shell_completion import get_completion_class

    from pyfastlora.cli.main import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "fastlora", VARIABLE).source())
