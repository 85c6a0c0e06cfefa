"""type: completion. Plain text, trained on from the first token to the last; long texts are split."""

from __future__ import annotations

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row


def prompt_type(field: str) -> PromptType:
    """Rows whose text stands in this field."""

    def render(row: Row) -> tuple[Piece, ...]:
        return (Piece(row[field], True),)

    return PromptType("completion", (field,), (), render, splits=True)


PROMPT_TYPE = prompt_type("text")
