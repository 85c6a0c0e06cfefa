"""What a prompt family is: the fields a row must have, and the text pieces it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    whatever the response. check: what else a row must be, its fields being there; with it they need not be
    text. ends: BOS and EOS are put around the pieces. splits: a sample longer than sequence_len becomes
    several, instead of being dropped or cut. also: other spellings of fields. tokenised: a row has its tokens
    and labels.
    """

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    render: Callable[[Row], tuple[Piece, ...]]
    splits: bool = False
    check: Callable[[Row], str | None] | None = None
    ends: bool = True
    also: Mapping[str, str] = field(default_factory=dict)
    tokenised: bool = False

    def spelled(self, row: Any) -> Any:
        """The row with its fields under the names that render knows."""
        if not self.also or not isinstance(row, Mapping):
            return row
        return {self.also[k]: v for k, v in row.items() if k in self.also} | dict(row)

    def why_not(self, row: Any) -> str | None:
        """Why a row cannot be rendered, to be read after where the row is; or None."""
        if not isinstance(row, Mapping):
            return f"must be an object with fields; got {type(row).__name__}"
        missing = [f for f in self.fields if row.get(f) is None]
        if missing:
            return f"type {self.name} needs {_quoted(self.fields, ' and ')}; this row has {_quoted(row)}"
        if self.check is not None:
            return self.check(row)
        for name in (*self.fields, *self.optional):
            value = row.get(name)
            if value is not None and (reason := bad_text(value)) is not None:
                return f'"{name}" {reason}'
        return None


def bad_text(value: Any) -> str | None:
    """Why a value is no text, to be read after its name; or None."""
    if not isinstance(value, str):
        return f"must be text; got {type(value).__name__}"
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return "has half of a surrogate pair (\\ud800 to \\udfff alone), which is no character"
    return None


def _quoted(names: Any, between: str = ", ") -> str:
    """Field names in quotes; a row may have hundreds, of which the first dozen tell enough."""
    names = list(names)
    shown = between.join(f'"{n}"' for n in names[:12])
    return (shown or "no fields") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
