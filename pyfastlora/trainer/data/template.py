"""type: {..}. A template of the user's own, for one instruction and one response.

type:
  system_prompt: You are terse.                  # or field_system: its field
  field_instruction: question
  field_output: answer
  format: "[INST] {instruction} {input} [/INST]"
  no_input_format: "[INST] {instruction} [/INST]"
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row

if TYPE_CHECKING:
    from pyfastlora.trainer.config import TemplateKeys


def why_not(format: str, names: tuple[str, ...]) -> str | None:
    """Why a format cannot be filled in with `names`, to be read after its key; or None."""
    try:
        found = [part[1:] for part in string.Formatter().parse(format) if part[1] is not None]
    except ValueError as error:
        return f"is no format: {error}; a brace of the text is written twice"
    for name, spec, conversion in found:
        if name not in names or spec or conversion:
            written = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if spec else ''}{spec}"
            return f"has {{{written}}}; it can have {', '.join(f'{{{name}}}' for name in names)}"
    return None


def prompt_type(keys: TemplateKeys) -> PromptType:
    """The type that the mapping describes."""
    with_input = keys.format
    without = with_input if keys.no_input_format is None else keys.no_input_format

    def render(row: Row) -> tuple[Piece, ...]:
        system = (row.get(keys.field_system) if keys.field_system else None) or keys.system_prompt
        given = row.get(keys.field_input)
        turn = (with_input if given else without).format(
            instruction=row[keys.field_instruction], input=given or ""
        )
        opening = keys.system_format.format(system=system) if system else ""
        return Piece(opening + turn, False), Piece(row[keys.field_output], True)

    optional = (keys.field_input, *((keys.field_system,) if keys.field_system else ()))
    return PromptType("of your own", (keys.field_instruction, keys.field_output), optional, render)
