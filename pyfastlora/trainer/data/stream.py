"""Text that is trained on as it is read: a buffer of samples at a time, shuffled or packed, and none kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.registry import prompt_type
from pyfastlora.trainer.data.sources import Files, open_source, read_rows
from pyfastlora.trainer.data.tokenise import Counts, Rules, tokenise
from pyfastlora.trainer.errors import DataError
from pyfastlora.trainer.packing import PackedRows

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Stream(torch.utils.data.IterableDataset[Any]):
    """The samples of pretraining_dataset, or rows of packed ones, in passes that end with the data.

    Its entries take turns, some rows each. Each pass is shuffled in another way, decided by the seed.
    counts says what became of the rows so far, by entry.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, packed: bool = False) -> None:
        self.config, self.tokenizer, self.packed = config, tokenizer, packed
        self._entries = {f"pretraining_dataset[{i}]": e for i, e in enumerate(config.pretraining_dataset)}
        self.counts = {name: Counts() for name in self._entries}
        self._passes = 0

    def check(self) -> None:
        """Raises DataError where an entry's first rows cannot be read, or are no samples."""
        for name, entry in self._entries.items():
            if not any(map(len, self._tables(name, Counts()))):
                raise DataError(f"{name}.path: {entry.path} has no text")

    def contents(self) -> dict[str, str]:
        """What each entry is known by: its keys and the sizes of its files, as it is not read ahead."""
        found = {}
        for name, entry in self._entries.items():
            source = open_source(entry.as_dataset(), name, streaming=True)
            sizes = [path.stat().st_size for path, _ in source.files] if isinstance(source, Files) else []
            found[name] = json.dumps([entry.model_dump(mode="json"), sizes])
        return found

    def __iter__(self) -> Iterator[Any]:
        self._passes += 1
        config = self.config
        for number, samples in enumerate(self._buffers()):
            seed = int(np.random.SeedSequence([config.seed, self._passes, number]).generate_state(1)[0])
            if self.packed:
                rows: Any = PackedRows.of(samples, config, seed)
            else:
                rows = samples.shuffle(seed) if config.sampling == "random" else samples
            yield from (rows[i] for i in range(len(rows)))

    def _buffers(self) -> Iterator[Dataset]:
        import datasets
        import pyarrow as pa

        tables = _in_turns([self._tables(name, counts) for name, counts in self.counts.items()])
        held: list[pyarrow.Table] = []
        for table in itertools.chain(tables, [None]):
            if table is not None:
                held.append(table)
            if held and (table is None or sum(map(len, held)) >= self.config.streaming_multipack_buffer_size):
                yield datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(held)))
                held = []

    def _tables(self, name: str, counts: Counts) -> Iterator[pyarrow.Table]:
        skip, entry = self._entries[name].skip, self._entries[name].as_dataset()
        rows = itertools.islice(read_rows(entry, name, streaming=True), skip, None)
        kind = prompt_type(entry, self.tokenizer)
        return tokenise(rows, kind, self.tokenizer, Rules.of(self.config), counts)


def _in_turns(parts: list[Iterable[T]]) -> Iterator[T]:
    """One of each, again and again; those that have ended are left out."""
    running = [iter(part) for part in parts]
    while running:
        left = []
        for part in running:
            for item in itertools.islice(part, 1):
                yield item
                left.append(part)
        running = left
