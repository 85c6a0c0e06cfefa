"""`fastlora inference`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import click

from pyfastlora.cli._flags import keyed, takes_config
from pyfastlora.cli._model import chooses_model, loaded_with_choice
from pyfastlora.cli._threads import give_way
from pyfastlora.cli._user_errors import mistakes_reported

if TYPE_CHECKING:
    from pyfastlora.trainer.inference import Prompts


@keyed()
@takes_config
@click.option("--prompt", metavar="TEXT", help="What is asked.")
@click.option("--prompt-file", type=click.File(encoding="utf-8"), help="The same from a file; -: stdin.")
@click.option("--row", metavar="JSON", help="A row of the dataset, its response left out.")
@click.option("--chat", is_flag=True, help="Ask again and again; in conversations, turn by turn.")
@click.option("--system", metavar="TEXT", help="Conversations: the system's message.")
@click.option("--raw", is_flag=True, help="The prompt as it is, in no template.")
@click.option("--dataset", default=0, metavar="N", help="Whose type writes the prompt (0, the first).")
@chooses_model
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0: the likeliest token (0).")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Of the likeliest with this sum.")
@click.option("--top-k", type=click.IntRange(1), help="Of the k likeliest.")
@click.option("--seed", type=int, help="Of the choices, with --temperature above 0.")
def inference(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    prompt: str | None,
    prompt_file: IO[str] | None,
    row: str | None,
    chat: bool,
    system: str | None,
    raw: bool,
    dataset: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    **model: Any,
) -> None:
    """Ask a model, in the words that it was trained with.

    \b
    fastlora inference cfg.yaml --prompt "Why is the sky blue?"
    fastlora inference cfg.yaml --row '{"instruction": "Translate.", "input": "Bonjour"}'
    fastlora inference cfg.yaml --chat --temperature 0.7 --top-p 0.9
    echo "def f(x):" | fastlora inference cfg.yaml --merged --raw
    fastlora inference cfg.yaml --prompt-file question.txt --base

    The prompt is written as a row of the dataset is, up to its response: in the template of its type, or by
    the chat template. The answer is printed while it is made. Without an option the model is what output_dir
    holds. In --chat, /reset begins anew; Ctrl-D ends.

    \b
    Exit codes: 0 answered; 2 a mistake in the command line or the file; 1 anything else.
    """
    give_way()
    with mistakes_reported():
        if temperature == 0 and (top_p is not None or top_k is not None or seed is not None):
            raise click.UsageError("--top-p, --top-k and --seed need --temperature above 0")
        if prompt_file is None and prompt is None and row is None and not chat and not sys.stdin.isatty():
            prompt_file = sys.stdin
        if sum((prompt is not None, prompt_file is not None, row is not None, chat)) != 1:
            raise click.UsageError("give one of --prompt, --prompt-file, --row and --chat")
        loaded, choice = loaded_with_choice(ctx, config, overrides)
        from pyfastlora.trainer.inference import Prompts, Sampling, generate
        from pyfastlora.trainer.job import libraries_quiet
        from pyfastlora.trainer.loading import load, memory_told, tokenizer_of

        with libraries_quiet(), memory_told("a shorter prompt and fewer --max-new-tokens take less"):
            prompts = Prompts(loaded.config, tokenizer_of(loaded.config), dataset, raw)
            ids = None
            if row is not None:
                ids = prompts.of_row(_object(row))
            elif not chat:
                text = prompt if prompt_file is None else prompt_file.read().removesuffix("\n")
                if not text:
                    raise click.UsageError("the prompt is empty")
                ids = prompts.of_text(text, system)
            found = load(loaded.config, choice)
            if seed is not None:
                import torch

                torch.manual_seed(seed)
            sampling = Sampling(max_new_tokens, temperature, top_p, top_k)

            def answer(ids: list[int]) -> str:
                text = generate(found.model, found.tokenizer, ids, sampling, prompts.stop, _say)
                click.echo()
                return text

            if ids is not None:
                answer(ids)
            else:
                _converse(prompts, system, answer)


def _converse(prompts: Prompts, system: str | None, answer: Callable[[list[int]], str]) -> None:
    """A prompt a line, until there are no more."""
    if prompts.chat is None:
        click.echo(f"type {prompts.name} has no turns: each line is asked by itself", err=True)
    opening = [{"role": "system", "content": system}] if system and prompts.chat else []
    messages = list(opening)
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            click.echo(err=True)
            return
        text = line.strip()
        if text == "/reset":
            messages = list(opening)
        elif text and prompts.chat is None:
            answer(prompts.of_text(text, system))
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer(prompts.of_messages(messages))})


def _say(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _object(row: str) -> dict[str, Any]:
    try:
        found = json.loads(row)
    except ValueError as error:
        raise click.UsageError(f"--row: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.UsageError(f"--row must be an object with the dataset's fields; got {row[:60]}")
    return found
