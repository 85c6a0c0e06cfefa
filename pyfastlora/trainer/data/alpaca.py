"""type: alpaca. Instruction, optional input, response, under the preambles of Stanford's Alpaca.

The wording is the published convention of the format: models trained elsewhere on it expect exactly this
text.
"""

from __future__ import annotations

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt(instruction: str, input: str | None = None) -> str:
    """The text a model is given; an empty input is no input."""
    template = WITH_INPUT if input else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def _render(row: Row) -> tuple[Piece, ...]:
    return Piece(prompt(row["instruction"], row.get("input")), False), Piece(row["output"], True)


PROMPT_TYPE = PromptType("alpaca", ("instruction", "output"), ("input",), _render)
