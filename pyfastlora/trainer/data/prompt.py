"""What a prompt family is: the fields a row must have, and the text pieces it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Piece(NamedTuple):
    """A stretch of text that is tokenised by itself; trained says whether the loss counts its tokens."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PromptType:
    """One value of a dataset's `type` key.

    render gets a row whose `fields` are text and whose `optional` fields are text or absent. It returns
    pieces in reading order; each is tokenised separately, so that the same prompt has the same tokens
    whatever the response. splits: a sample longer than sequence_len becomes several, instead of being
    dropped or cut. takes_field: the dataset's `field` key replaces the one entry of `fields`.
    """

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    render: Callable[[Row], tuple[Piece, ...]]
    splits: bool = False
    takes_field: bool = False

    def why_not(self, row: Any) -> str | None:
        """Why a row cannot be rendered, to be read after where the row is; or None."""
        if not isinstance(row, Mapping):
            return f"must be an object with fields; got {type(row).__name__}"
        missing = [f for f in self.fields if row.get(f) is None]
        if missing:
            return f"type {self.name} needs {_quoted(self.fields, ' and ')}; this row has {_quoted(row)}"
        for name in (*self.fields, *self.optional):
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                return f'"{name}" must be text; got {type(value).__name__}'
            if value and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                return (
                    f'"{name}" has half of a surrogate pair (\\ud800 to \\udfff alone), which is no character'
                )
        return None


def _quoted(names: Any, between: str = ", ") -> str:
    """Field names in quotes; a row may have hundreds, of which the first dozen tell enough."""
    names = list(names)
    shown = between.join(f'"{n}"' for n in names[:12])
    return (shown or "no fields") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
