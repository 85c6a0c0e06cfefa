"""No type: rows that are token ids already, with the labels to train on."""

from __future__ import annotations

from typing import Any

from pyfastlora.trainer.data.prompt import PromptType, Row

IGNORED = -100


def _why_not(row: Row, tokens: int) -> str | None:
    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    for name, values in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if values is not None and not _are_ints(values):
            return f'"{name}" must be a list of whole numbers'
    if len(labels) != len(ids) or (mask is not None and len(mask) != len(ids)):
        return '"input_ids", "labels" and "attention_mask" must be of one length'
    if not ids:
        return '"input_ids" is empty'
    if not 0 <= min(ids) <= max(ids) < tokens:
        return f'"input_ids" must be from 0 to {tokens - 1}, as the tokenizer has {tokens} tokens'
    if any(b not in (a, IGNORED) for a, b in zip(ids, labels, strict=True)):
        return f'each of "labels" must be its token\'s id, or {IGNORED} where nothing is to be trained'
    if mask is not None and set(mask) - {1}:
        return '"attention_mask" must be all 1: rows are padded, and padding is masked, when batches are made'
    return None


def _are_ints(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def prompt_type(tokens: int) -> PromptType:
    """The type for a tokenizer of so many tokens."""
    return PromptType(
        "none",
        ("input_ids", "labels"),
        ("attention_mask",),
        lambda row: (),
        check=lambda row: _why_not(row, tokens),
        tokenised=True,
    )
