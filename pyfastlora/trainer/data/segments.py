"""type: input_output. Text in segments that are trained or not; no template, no ends.

{"segments": [{"label": false, "text": "<s>Hello\n"}, {"label": true, "text": "hi there!</s>"}]}
"""

from __future__ import annotations

from collections.abc import Mapping

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row, bad_text


def _render(row: Row) -> tuple[Piece, ...]:
    return tuple(Piece(segment["text"], segment["label"]) for segment in row["segments"])


def _why_not(row: Row) -> str | None:
    segments = row["segments"]
    if not isinstance(segments, list) or not segments:
        return '"segments" must be a list with at least one segment'
    for i, segment in enumerate(segments, 1):
        if not isinstance(segment, Mapping) or not isinstance(segment.get("label"), bool):
            return f'segment {i} of "segments" must be an object with "label" (true or false) and "text"'
        if (reason := bad_text(segment.get("text"))) is not None:
            return f'"text" of segment {i} {reason}'
    return None


PROMPT_TYPE = PromptType("input_output", ("segments",), (), _render, check=_why_not, ends=False)
