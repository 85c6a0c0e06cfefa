"""The reference of all keys, as Markdown, from the schema itself.

python -m pyfastlora.trainer.config.reference   puts it into docs/training.md, between its two markers
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pyfastlora.trainer.config.adapter import AdapterKeys
from pyfastlora.trainer.config.data import DataKeys, DatasetKeys, TemplateKeys
from pyfastlora.trainer.config.model import BnbKeys, CheckpointingKeys, ModelKeys, SpecialTokens
from pyfastlora.trainer.config.optimisation import OptimisationKeys
from pyfastlora.trainer.config.run import RunKeys
from pyfastlora.trainer.config.values import Keys

BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
_GROUPS: tuple[type[Keys], ...] = (
    *(ModelKeys, AdapterKeys, DataKeys, OptimisationKeys, RunKeys),
    *(DatasetKeys, TemplateKeys, SpecialTokens, BnbKeys, CheckpointingKeys),
)


def reference() -> str:
    """One table per group of keys: name, type, default, meaning."""
    return "\n".join(line for group in _GROUPS for line in _table(group))


def updated(page: str) -> str:
    """The page with the text between its markers replaced by the reference."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{reference()}\n{END}{rest.split(END)[1]}"


def _table(group: type[Keys]) -> Iterator[str]:
    yield f"\n### {(group.__doc__ or '').strip()}\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in group.model_fields.items():
        if name in group.__annotations__:
            yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description or ''} |"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin in (types.UnionType, Union):
        return ", ".join(_type(a) for a in arguments if a is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value == [] or isinstance(value, dict | BaseModel):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/training.md")
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
