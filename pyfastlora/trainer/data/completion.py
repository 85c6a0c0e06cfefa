"""type: completion. Plain text, trained on from the first token to the last; long texts are split."""

from __future__ import annotations

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row


def _render(row: Row) -> tuple[Piece, ...]:
    return (Piece(row["text"], True),)


PROMPT_TYPE = PromptType("completion", ("text",), (), _render, splits=True, takes_field=True)
