"""Prepared data on disk: the samples of one dataset, in a folder named after a hash of all that shaped them.

samples.arrow   columns input_ids, labels (lists of int32) and length, in Arrow's stream format
counts.json     what became of the rows; written last

Hashed are the content of the files, the keys that decide what a sample is, the tokenizer with its template
and FORMAT; names, places and dates are not. So a byte changed in place makes another dataset, a copy none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyfastlora import _cache
from pyfastlora.trainer.config import Config, DatasetKeys
from pyfastlora.trainer.data.registry import prompt_type
from pyfastlora.trainer.data.sources import open_source, read_rows
from pyfastlora.trainer.data.tokenise import Counts, Rules, schema, tokenise
from pyfastlora.trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # raise it when the same rows become other samples
SAMPLES, COUNTS = "samples.arrow", "counts.json"
#: Keys of a dataset that say where it is, or how often it is seen.
_NO_MATTER = {"path", "data_files", "name", "split", "revision", "ds_type", "weight"}


def prepared(
    entry: DatasetKeys,
    key: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int], None],
) -> tuple[Dataset, Counts]:
    """The samples of one dataset, mapped into memory: from disk, or made now.

    `key` is its name in the configuration. Many processes may ask at once: one makes them, the others wait.
    Raises DataError for rows that cannot be read, or of which no sample is left.
    """
    import datasets
    import pyarrow as pa

    entry = config.with_template(entry)
    kind = prompt_type(entry, tokenizer)  # its template becomes the tokenizer's
    rules = Rules.of(config)

    name = name_of(entry, key, rules, tokenizer)

    def make(folder: Path) -> None:
        counts = Counts()
        with pa.ipc.new_stream(str(folder / SAMPLES), schema()) as stream:
            for table in tokenise(read_rows(entry, key), kind, tokenizer, rules, counts):
                stream.write_table(table)
                progress(counts.rows)
        _check_left(counts, entry, key, rules)
        if name_of(entry, key, rules, tokenizer) != name:
            raise DataError(f"{key}.path: {entry.path} changed while it was read; start again")
        (folder / COUNTS).write_text(json.dumps(dataclasses.asdict(counts)))

    try:
        folder = _cache.obtain(folders(config), name, COUNTS, make)
    except OSError as error:
        where = config.dataset_prepared_path or "the cache (FASTLORA_CACHE)"
        raise DataError(f"{key}: prepared data cannot be written to {where}: {error}") from error
    counts = Counts(**json.loads((folder / COUNTS).read_text()))
    return datasets.Dataset.from_file(str(folder / SAMPLES)), counts


def name_of(entry: DatasetKeys, key: str, rules: Rules, tokenizer: PreTrainedTokenizerBase) -> str:
    """The folder's name: of the hash of all that decides what the samples are."""
    digest = hashlib.sha256()
    shaping = entry.model_dump(mode="json", exclude=_NO_MATTER)
    digest.update(json.dumps([FORMAT, shaping, dataclasses.asdict(rules)], sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    open_source(entry, key).digest(digest)
    return f"data-{digest.hexdigest()[:24]}"


def folders(config: Config) -> list[Path]:
    """Where prepared data is looked for, and put."""
    if config.dataset_prepared_path:
        return [Path(os.path.expanduser(config.dataset_prepared_path)).absolute()]
    return [cache / "data" for cache in _cache.cache_dirs()]


def _check_left(count: Counts, entry: DatasetKeys, key: str, rules: Rules) -> None:
    if not count.rows:
        raise DataError(f"{key}.path: {entry.path} has no rows")
    if count.samples:
        return
    if count.bad_rows == count.rows:
        why = f"none of {count.rows} rows fits its type; the first: {count.first_bad}"
    elif count.dropped_too_long:
        why = (
            f"none of {count.rows} rows fits sequence_len: {rules.sequence_len} (the longest has "
            f"{count.longest} tokens); raise sequence_len, or set excess_length_strategy: truncate"
        )
    else:
        why = f"none of {count.rows} rows has a token to train on"
    raise DataError(f"{key}.path: {entry.path}: {why}")
