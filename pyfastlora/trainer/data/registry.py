"""The prompt families by name. A new one is a file beside this one, and its entry here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyfastlora.trainer.data import alpaca, chat, completion, instruct, older, segments, template, tokenised
from pyfastlora.trainer.data.prompt import PromptType, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.config import DatasetKeys

_FIXED = {
    t.name: t
    for t in (
        alpaca.PROMPT_TYPE,
        *instruct.PROMPT_TYPES,
        completion.PROMPT_TYPE,
        segments.PROMPT_TYPE,
        *older.PROMPT_TYPES,
    )
}
CHATS = ("chat_template", *chat.SHAREGPT)


def prompt_type_names() -> tuple[str, ...]:
    """Every name that a dataset's `type` may have; it may also be a template, or absent."""
    return (*_FIXED, *CHATS)


def prompt_type(entry: DatasetKeys, tokenizer: PreTrainedTokenizerBase) -> PromptType:
    """What a dataset's rows are, for this tokenizer."""
    if entry.type is None:
        return tokenised.prompt_type(len(tokenizer))
    if not isinstance(entry.type, str):
        return template.prompt_type(entry.type)
    if entry.type in CHATS:
        return chat.prompt_type(entry, tokenizer)
    return _FIXED[entry.type] if entry.field is None else completion.prompt_type(entry.field)


def fitting_types(row: Row) -> Iterable[str]:
    """Names of the families that could take this row: advice for someone who chose another."""
    fits = [t.name for t in _FIXED.values() if t.why_not(t.spelled(row)) is None]
    for field, name in (("messages", "chat_template"), ("conversations", "sharegpt")):
        if isinstance(row, dict) and isinstance(row.get(field), list):
            fits.append(name)
    return fits
