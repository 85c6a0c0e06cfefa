"""All datasets of a configuration as one training set and one held-out set, with a report on both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.config import Config, DatasetKeys
from pyfastlora.trainer.data.registry import prompt_type
from pyfastlora.trainer.data.sources import read_rows
from pyfastlora.trainer.data.tokenise import Counts, Rules, tokenise
from pyfastlora.trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.packing import PackedRows


@dataclass(frozen=True)
class PreparedData:
    """Columns input_ids, labels and length, or rows of packed samples; held_out is None where nothing is."""

    train: Dataset | PackedRows
    held_out: Dataset | PackedRows | None
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """The report as a few readable lines."""
        text = [_line(key, c) for key, c in self.report["datasets"].items()]
        held_out = f", {self.report['held_out_samples']} held out" if self.held_out is not None else ""
        return [*text, f"{self.report['train_samples']} samples to train on{held_out}"]


def prepare(
    config: Config, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int], None] = lambda rows: None
) -> PreparedData:
    """Reads, renders and tokenises every dataset; `progress` hears of every batch of rows.

    Raises DataError where data is missing, malformed or empty, or where holding out leaves nothing to train
    on.
    """
    counts: dict[str, Counts] = {}
    train = _together(config.datasets, "datasets", config, tokenizer, counts, progress)
    held_out = None
    if config.test_datasets:
        held_out = _together(config.test_datasets, "test_datasets", config, tokenizer, counts, progress)
    elif config.val_set_size:
        train, held_out = _split(train, config)
    report = {
        "datasets": {key: dataclasses.asdict(c) for key, c in counts.items()},
        "train_samples": len(train),
        "held_out_samples": 0 if held_out is None else len(held_out),
    }
    return PreparedData(train, held_out, report)


def _together(
    entries: Sequence[DatasetKeys],
    section: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, Counts],
    progress: Callable[[int], None],
) -> Dataset:
    import datasets
    import pyarrow as pa

    rules = Rules(
        config.sequence_len, config.train_on_inputs, config.excess_length_strategy, config.on_bad_row
    )
    tables = []
    for i, entry in enumerate(entries):
        key, count = f"{section}[{i}]", Counts()
        for table in tokenise(read_rows(entry, key), prompt_type(entry, tokenizer), tokenizer, rules, count):
            tables.append(table)
            progress(count.rows)
        counts[f"{key} {entry.path}"] = count
        if not count.rows:
            raise DataError(f"{key}.path: {entry.path} has no rows")
        if not count.samples:
            raise DataError(f"{key}.path: {entry.path}: {_why_nothing_left(count, config.sequence_len)}")
    return datasets.Dataset(pa.concat_tables(tables))


def _why_nothing_left(count: Counts, sequence_len: int) -> str:
    if count.bad_rows == count.rows:
        return f"none of {count.rows} rows fits its type; the first: {count.first_bad}"
    if count.dropped_too_long:
        return (
            f"none of {count.rows} rows fits sequence_len: {sequence_len} (the longest has {count.longest} "
            "tokens); raise sequence_len, or set excess_length_strategy: truncate"
        )
    return f"none of {count.rows} rows has a token to train on"


def _split(data: Dataset, config: Config) -> tuple[Dataset, Dataset]:
    size = config.val_set_size
    held_out = int(size) if size >= 1 else max(1, round(size * len(data)))
    if held_out >= len(data):
        raise DataError(f"val_set_size: {size:g} of {len(data)} samples leaves nothing to train on")
    split = data.train_test_split(test_size=held_out, seed=config.seed, keep_in_memory=True)
    return split["train"], split["test"]


def _line(key: str, c: dict[str, Any]) -> str:
    share = c["trained_tokens"] / c["tokens"]
    text = f"{key}: {c['samples']} samples, {c['tokens']} tokens, {share:.0%} trained on"
    for name, meaning in (
        ("dropped_too_long", "dropped as longer than sequence_len"),
        ("truncated", "cut to sequence_len"),
        ("dropped_untrained", "dropped with nothing to train on"),
    ):
        if c[name]:
            text += f"; {c[name]} {meaning}"
    if c["bad_rows"]:
        text += f"; {c['bad_rows']} skipped as they do not fit their type, the first: {c['first_bad']}"
    return text
