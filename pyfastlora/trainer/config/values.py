"""What the groups of keys are made of: their base, and numbers that no boolean passes for."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python would take true for 1
        raise ValueError("must be a number; got true" if value else "must be a number; got false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Keys(BaseModel):
    """Base of every group: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def one_of(
    value: str, allowed: tuple[str, ...], gone: dict[str, str], refused: dict[str, str] | None = None
) -> str:
    """`value` if it is allowed. gone: what took a name's place; refused: why a name cannot be had."""
    if value in gone:
        raise ValueError(f"{reprlib.repr(value)} no longer exists; {gone[value]} takes its place")
    if refused and value in refused:
        raise ValueError(f"{value} {refused[value]}")
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}; got {reprlib.repr(value)}")
    return value
