"""All datasets of a configuration as one training set and one held-out set, with a report on both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.store import prepared
from pyfastlora.trainer.data.stream import Stream
from pyfastlora.trainer.data.tokenise import Counts
from pyfastlora.trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.packing import PackedRows, Packing


@dataclass(frozen=True)
class PreparedData:
    """Columns input_ids, labels and length, or rows of packed samples; held_out is None where nothing is.

    counts: what became of the rows of every dataset; of a stream's, so far. contents: a hash of the content
    and meaning of each.
    """

    train: Dataset | PackedRows | Stream
    held_out: Dataset | PackedRows | None
    counts: dict[str, Counts]
    train_samples: int | None  # None: nobody knows, they are streamed
    held_out_samples: int
    contents: dict[str, str]
    packing: Packing | None = None

    @property
    def report(self) -> dict[str, Any]:
        """All that is known about the data, for a JSON file."""
        found: dict[str, Any] = {
            "datasets": {key: dataclasses.asdict(c) for key, c in self.counts.items()},
            "train_samples": self.train_samples,
            "held_out_samples": self.held_out_samples,
        }
        return found if self.packing is None else found | {"packing": self.packing.to_dict()}

    @property
    def train_rows(self) -> int:
        """Rows of an epoch, packed or not; 0 where they are streamed."""
        return 0 if isinstance(self.train, Stream) else len(self.train)

    def counted(self) -> list[str]:
        """A readable line for each dataset of which rows were read."""
        return [_line(key, c) for key, c in self.counts.items() if c.rows]

    def lines(self) -> list[str]:
        """The same as a few readable lines."""
        if self.train_samples is None:
            trained = "pretraining_dataset is read as it is needed"
        else:
            trained = f"{self.train_samples} samples to train on"
        held_out = f", {self.held_out_samples} held out" if self.held_out_samples else ""
        return [*self.counted(), trained + held_out]


def prepare(
    config: Config, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int], None] = lambda rows: None
) -> PreparedData:
    """Every dataset read, rendered and tokenised, or found so; `progress` hears of every batch of rows.

    Raises DataError where data is missing, malformed or empty, or where holding out leaves nothing to train
    on.
    """
    counts: dict[str, Counts] = {}
    contents: dict[str, str] = {}
    held_out = None
    if config.pretraining_dataset:
        train: Any = Stream(config, tokenizer)
        train.check()
        counts |= train.counts
        contents |= train.contents()
    else:
        train = _together("datasets", config, tokenizer, counts, contents, progress)
    if config.dataset_shard_num:
        train = train.shard(config.dataset_shard_num, config.dataset_shard_idx, contiguous=False)
    if config.test_datasets:
        held_out = _together("test_datasets", config, tokenizer, counts, contents, progress)
    elif config.val_set_size:
        train, held_out = _split(train, config)
    samples = None if config.pretraining_dataset else len(train)
    kept = 0 if held_out is None else len(held_out)
    return PreparedData(train, held_out, counts, samples, kept, contents)


def held_out_by_dataset(
    config: Config, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int], None] = lambda rows: None
) -> dict[str, Dataset]:
    """The held-out samples of `prepare`, apart for each dataset; with test_datasets nothing else is read."""
    import numpy as np

    if config.test_datasets:
        return _entries("test_datasets", config, tokenizer, {}, {}, progress)
    parts = _entries("datasets", config, tokenizer, {}, {}, progress)
    chosen = np.arange(sum(map(len, parts.values())))
    if config.dataset_shard_num:
        chosen = chosen[config.dataset_shard_idx :: config.dataset_shard_num]
    chosen = chosen[_divided(len(chosen), config)[0]]
    found: dict[str, Dataset] = {}
    start = 0
    for name, data in parts.items():
        end = start + len(data)
        mine = np.sort(chosen[(chosen >= start) & (chosen < end)]) - start
        found |= {name: data.select(mine)} if len(mine) else {}
        start = end
    return found


def _together(
    section: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, Counts],
    contents: dict[str, str],
    progress: Callable[[int], None],
) -> Dataset:
    import datasets

    entries = _entries(section, config, tokenizer, counts, contents, progress)
    return datasets.concatenate_datasets(list(entries.values()))


def _entries(
    section: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, Counts],
    contents: dict[str, str],
    progress: Callable[[int], None],
) -> dict[str, Dataset]:
    import datasets

    found = {}
    for i, entry in enumerate(getattr(config, section)):
        key = f"{section}[{i}]"
        name = f"{key} {entry.path}"
        data, counts[name] = prepared(entry, key, config, tokenizer, progress)
        contents[key] = Path(data.cache_files[0]["filename"]).parent.name
        found[name] = datasets.concatenate_datasets(_weighted(data, entry.weight, config.seed))
    return found


def _weighted(data: Dataset, weight: float, seed: int) -> list[Dataset]:
    """The samples `weight` times: whole copies, and of the rest a random part."""
    import numpy as np

    copies, rest = divmod(max(1, round(weight * len(data))), len(data))
    chosen = np.random.default_rng(seed).permutation(len(data))[:rest]
    return [data] * copies + ([data.select(np.sort(chosen))] if rest else [])


def _split(data: Dataset, config: Config) -> tuple[Dataset, Dataset]:
    held_out, trained = _divided(len(data), config)
    return data.select(trained), data.select(held_out)


def _divided(count: int, config: Config) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which of `count` samples are held out, and which are trained on."""
    import numpy as np

    size = config.val_set_size
    held_out = int(size) if size >= 1 else max(1, round(size * count))
    if held_out >= count:
        raise DataError(f"val_set_size: {size:g} of {count} samples leaves nothing to train on")
    order = np.random.default_rng(config.seed).permutation(count)
    return np.sort(order[:held_out]), np.sort(order[held_out:])


def _line(key: str, c: Counts) -> str:
    share = c.trained_tokens / c.tokens
    text = f"{key}: {c.samples} samples, {c.tokens} tokens, {share:.0%} trained on"
    for name, meaning in (
        ("dropped_too_long", "dropped as longer than sequence_len"),
        ("truncated", "cut to sequence_len"),
        ("dropped_untrained", "dropped with nothing to train on"),
    ):
        if count := getattr(c, name):
            text += f"; {count} {meaning}"
    if c.bad_rows:
        text += f"; {c.bad_rows} skipped as they do not fit their type, the first: {c.first_bad}"
    return text
