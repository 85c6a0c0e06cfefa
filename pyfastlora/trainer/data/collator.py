"""Batches: samples padded on the right to one length, padding masked out of attention and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfastlora.trainer.data.tokenise import IGNORED


@dataclass(frozen=True)
class PaddingCollator:
    """Rows with input_ids and labels to input_ids, labels and attention_mask [B, T], all int64, and the
    number of tokens.

    T is the longest row, or pad_to where given. pad_id may be any id: attention and loss never look at it. A
    first token has nothing to be predicted from and counts as not trained on.
    """

    pad_id: int
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = self.pad_to or max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.as_tensor(row["input_ids"])
            labels[i, 1:n] = torch.as_tensor(row["labels"][1:])
            mask[i, :n] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "tokens": mask.sum()}
