"""The prompt families by name. A new one is a file with a PROMPT_TYPE beside this one, and its entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pyfastlora.trainer.data import alpaca, completion
from pyfastlora.trainer.data.prompt import PromptType, Row

_TYPES = {t.name: t for t in (alpaca.PROMPT_TYPE, completion.PROMPT_TYPE)}


def prompt_type_names() -> tuple[str, ...]:
    """Every value that a dataset's `type` may have."""
    return tuple(_TYPES)


def prompt_type(name: str, field: str | None = None) -> PromptType:
    """The family called name; `field` is the dataset's own name for its text, where the family takes one."""
    found = _TYPES[name]
    if field is None or found.fields == (field,):
        return found
    assert found.takes_field, "config.py refuses field for the others"
    (own,) = found.fields
    return dataclasses.replace(found, fields=(field,), render=lambda row: found.render({own: row[field]}))


def fitting_types(row: Row) -> Iterable[str]:
    """Names of the families that could take this row: advice for someone who chose another."""
    return [t.name for t in _TYPES.values() if t.why_not(row) is None]
