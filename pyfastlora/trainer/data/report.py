"""What prepared data is like: counts, lengths, duplicates, a histogram, and samples with what is trained."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.data.tokenise import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1000  # samples that are in memory together


def describe(data: Dataset) -> dict[str, Any]:
    """samples, tokens, trained_tokens and their share, duplicates, and the lengths' least, mean, quantiles.

    A duplicate has the tokens of a sample before it.
    """
    import numpy as np

    lengths, hashes, trained = lengths_of(data), np.zeros(len(data), np.uint64), 0
    for start in range(0, len(data), AT_ONCE):
        part = data.with_format("numpy")[start : start + AT_ONCE]
        for i, (ids, labels) in enumerate(zip(part["input_ids"], part["labels"], strict=True), start):
            hashes[i] = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
            trained += int((labels != IGNORED).sum())
    tokens = int(lengths.sum())
    marks = {"least": 0, "median": 50, "90 %": 90, "99 %": 99, "most": 100}
    return {
        "samples": len(data),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": round(trained / tokens, 4),
        "duplicates": len(data) - len(np.unique(hashes)),
        "lengths": {name: int(np.percentile(lengths, mark)) for name, mark in marks.items()},
        "mean_length": round(tokens / len(data), 1),
    }


def lengths_of(data: Dataset) -> np.ndarray[Any, Any]:
    """The number of tokens of every sample."""
    import numpy as np

    return np.asarray(data.with_format("numpy")["length"][:])


def plot_lengths(data: Dataset, sequence_len: int, path: Path) -> None:
    """A histogram of the lengths as a PNG, with sequence_len marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(lengths_of(data), bins=60, color="#4477aa")
    axes.axvline(sequence_len, color="#cc6677", label=f"sequence_len {sequence_len}")
    axes.set(xlabel="tokens of a sample", ylabel="samples", title=f"{len(data)} samples to train on")
    axes.legend()
    figure.savefig(path, dpi=120)


def runs_of(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The text of a sample in stretches, each with whether it is trained on."""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield str(tokenizer.decode([token for token, _ in run])), trained
