"""Packing: several samples one after the other in a row, so that rows are full instead of padded.

Samples are documents: positions start again at each of them, and with no attention mask, no cache and these
positions transformers lets no token see another document's. Whether a model keeps to that is probed, because
not every family does. The loss is that of the same samples unpacked, token for token: nothing is predicted
across a border.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfastlora import host
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.data.tokenise import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

    from pyfastlora.trainer.config import Config

# Of the logits' spread. Where documents are kept apart nothing changes at all, Falcon's change by 0.1.
LEAKS = 1e-3
#: Known before there is a model to probe: these let documents see one another, in every attention.
LEAKY_FAMILIES = ("falcon", "mpt")


@dataclass(frozen=True)
class Packing:
    """Which samples share a row: row i holds samples[starts[i] : starts[i + 1]]."""

    samples: NDArray[np.int64]
    starts: NDArray[np.int64]
    capacity: int
    tokens: int
    bound: int  # no packing has fewer rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> NDArray[np.int64]:
        """The samples of row i."""
        return self.samples[self.starts[i] : self.starts[i + 1]]

    @property
    def efficiency(self) -> float:
        """The share of the rows that holds tokens."""
        return self.tokens / max(1, len(self) * self.capacity)

    def to_dict(self) -> dict[str, Any]:
        """For the report on the data."""
        return {
            "samples": len(self.samples),
            "rows": len(self),
            "capacity": self.capacity,
            "efficiency": round(self.efficiency, 6),
            "lower_bound": self.bound,
        }

    def __str__(self) -> str:
        """ "120 samples in 14 rows of 512 tokens, 98.2% full; no packing has fewer than 14"."""
        return (
            f"{len(self.samples)} samples in {len(self)} rows of {self.capacity} tokens, "
            f"{self.efficiency:.1%} full; no packing has fewer than {self.bound}"
        )


def pack(lengths: Sequence[int] | NDArray[Any], capacity: int, *, seed: int = 0, most: int = 0) -> Packing:
    """Samples of these lengths, each at most `capacity`, in as few rows as best-fit decreasing finds.

    seed: which of equally long samples meet, and the order of the rows. most: samples to a row; 0: any
    number.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(sizes))
    rows = host.best_fit(sizes[shuffled], capacity, most)
    count = int(rows.max()) + 1 if len(rows) else 0
    rows = random.permutation(count)[rows] if count else rows
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
    tokens = int(sizes.sum())
    bound = max(-(-tokens // capacity), int((sizes > capacity // 2).sum()))
    return Packing(shuffled[np.argsort(rows, kind="stable")], starts, capacity, tokens, bound)


class PackedRows(torch.utils.data.Dataset[Any]):
    """The rows of a packing over a dataset of samples, each a list of samples."""

    def __init__(self, data: Dataset, packing: Packing) -> None:
        self.data, self.packing = data, packing

    @classmethod
    def of(cls, data: Any, config: Config, seed: int) -> PackedRows:
        """Rows of sequence_len tokens of a dataset with a column of lengths."""
        most = config.sample_packing_bin_size or 0
        return cls(data, pack(data["length"], config.sequence_len, seed=seed, most=most))

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, i: int) -> list[dict[str, Any]]:
        samples = self.data[self.packing.row(i).tolist()]
        return [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(samples["input_ids"], samples["labels"], strict=True)
        ]


@dataclass(frozen=True)
class PackedCollator:
    """Rows of samples to input_ids, labels and position_ids [B, T], all int64, the number of tokens, and the
    word that no cache is wanted.

    T is the longest row, or pad_to where given. Padding is a document of its own that nothing is trained on.
    A sample's first token is not trained on: what comes before it is another document.

    flat: all rows as one, with what flash attention's kernels ask for: cu_seq_lens_q and _k, where documents
    begin and the last one ends (int32), and max_length_q and _k, the longest of them.
    """

    pad_id: int
    pad_to: int | None = None
    flat: bool = False

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        lengths = [sum(len(sample["input_ids"]) for sample in row) for row in rows]
        shape = (len(rows), self.pad_to or max(lengths))
        input_ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            at = 0
            for sample in row:
                n = len(sample["input_ids"])
                input_ids[i, at : at + n] = torch.as_tensor(sample["input_ids"])
                labels[i, at + 1 : at + n] = torch.as_tensor(sample["labels"][1:])
                positions[i, at : at + n] = torch.arange(n)
                at += n
            positions[i, at:] = torch.arange(shape[1] - at)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        # with a cache transformers would not look for documents
        more = {"tokens": torch.tensor(sum(lengths)), "use_cache": False}
        if not self.flat:
            return batch | more
        batch = {name: column.reshape(1, -1) for name, column in batch.items()}
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
        ends = torch.cat([starts, torch.tensor([input_ids.numel()])]).int()
        longest = int(ends.diff().max())
        return (
            batch
            | more
            | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
            | dict.fromkeys(("max_length_q", "max_length_k"), longest)
        )


@dataclass(frozen=True)
class Collator:
    """Batches of rows, packed or not: packed data and data that is not may share a trainer."""

    padded: PaddingCollator
    packed: PackedCollator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return self.packed(rows) if isinstance(rows[0], list) else self.padded(rows)


def leak(model: torch.nn.Module, collator: PackedCollator, vocabulary: int, device: torch.device) -> float:
    """How much a document changes with the one before it in its row, in units of the logits' spread; 0: not.

    Two forwards of a batch of 21 tokens, in evaluation mode, without gradients.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (n,), generator=generator) for n in (9, 9, 12))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = [_logits(model, collator, [before, second], device)[9:21] for before in (first, other)]
    finally:
        model.train(was_training)
    return float((seen[0] - seen[1]).abs().max() / seen[0].std().clamp_min(1e-12))


def _logits(model: Any, collator: PackedCollator, documents: list[Tensor], device: torch.device) -> Tensor:
    batch = collator([[{"input_ids": ids, "labels": ids} for ids in documents]])
    del batch["tokens"], batch["labels"]
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    logits: Tensor = model(**moved).logits[0]
    return logits.double()
