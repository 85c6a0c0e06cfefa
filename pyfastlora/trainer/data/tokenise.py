"""Rows to columns of token ids and labels.

A sample is BOS (where the tokenizer puts one by itself), the tokens of its pieces, EOS (where the tokenizer
has one). labels equal input_ids where the loss counts a token and are -100 elsewhere. Pieces are tokenised
one by one and joined, so a token never spans prompt and response.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.data.prompt import Piece, PromptType
from pyfastlora.trainer.data.registry import fitting_types
from pyfastlora.trainer.data.sources import NumberedRow
from pyfastlora.trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.config import Config

IGNORED = -100  # torch's cross_entropy leaves targets of this value out
ROWS_AT_ONCE = 1000  # a batch is tokenised on all cores


@dataclass(frozen=True)
class Rules:
    """The parts of a configuration that decide what a sample looks like."""

    sequence_len: int
    train_on_inputs: bool = False
    excess_length_strategy: str = "drop"
    on_bad_row: str = "error"

    @classmethod
    def of(cls, config: Config) -> Rules:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


@dataclass
class Counts:
    """What became of the rows of one dataset. tokens and trained_tokens count the samples that were kept;
    first_bad says what was wrong with the first row that did not fit its type.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_untrained: int = 0
    bad_rows: int = 0
    first_bad: str = ""
    longest: int = 0


@dataclass
class Ends:
    """The ids a tokenizer opens and closes a text with; either may be empty."""

    bos: list[int] = field(default_factory=list)
    eos: list[int] = field(default_factory=list)


def ends_of(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """BOS only if the tokenizer itself prepends it to plain text; EOS whenever it has one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opens = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return Ends([bos] if opens else [], [eos] if eos is not None else [])


def tokenise(
    rows: Iterable[NumberedRow],
    prompt_type: PromptType,
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
    counts: Counts,
) -> Iterator[pyarrow.Table]:
    """Tables of input_ids, labels (lists of int32) and length, one per ROWS_AT_ONCE rows; fills counts.

    Raises DataError for a row that does not fit prompt_type, unless rules say `skip`, and for a long one
    where they say `raise`.
    """
    ends = ends_of(tokenizer) if prompt_type.ends else Ends()
    rows = iter(rows)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        counts.rows += len(batch)
        rendered = list(_good(batch, prompt_type, rules, counts))
        if prompt_type.tokenised:
            joined = [(row.values["input_ids"], row.values["labels"]) for row, _ in rendered]
        else:
            ids = _encode(tokenizer, [piece.text for _, sample in rendered for piece in sample])
            joined = [_join(sample, ids, ends, rules.train_on_inputs) for _, sample in rendered]
        samples: list[tuple[list[int], list[int]]] = []
        for (row, _), sample in zip(rendered, joined, strict=True):
            samples += _fit(sample, row.where, prompt_type, rules, counts)
        yield _table(samples, counts)


def _good(
    batch: Iterable[NumberedRow], prompt_type: PromptType, rules: Rules, counts: Counts
) -> Iterator[tuple[NumberedRow, tuple[Piece, ...]]]:
    """The rows that fit their type, with their pieces."""
    for row in batch:
        try:
            yield row, _checked(row, prompt_type)
        except DataError as error:
            if rules.on_bad_row == "error":
                raise
            counts.bad_rows += 1
            counts.first_bad = counts.first_bad or str(error)


def _checked(row: NumberedRow, prompt_type: PromptType) -> tuple[Piece, ...]:
    """The pieces of a row that fits its type."""
    values = prompt_type.spelled(row.values)
    reason = prompt_type.why_not(values)
    if reason is not None:
        fits = [t for t in fitting_types(row.values) if t != prompt_type.name]
        raise DataError(f"{row.where}: {reason}" + (f" (type: {fits[0]} would fit)" if fits else ""))
    try:
        return prompt_type.render(values)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    if not texts:  # every row was bad; transformers cannot encode nothing
        return iter([])
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return iter(encoded["input_ids"])


def _join(
    sample: tuple[Piece, ...], ids: Iterator[list[int]], ends: Ends, all_trained: bool
) -> tuple[list[int], list[int]]:
    """input_ids and labels; the ends share the fate of the piece they touch."""
    input_ids, labels = [], []
    for i, piece in enumerate(sample):
        own = next(ids)
        tokens = [*(ends.bos if i == 0 else []), *own, *(ends.eos if i == len(sample) - 1 else [])]
        input_ids += tokens
        labels += tokens if piece.trained or all_trained else [IGNORED] * len(tokens)
    return input_ids, labels


def _fit(
    sample: tuple[list[int], list[int]], where: str, prompt_type: PromptType, rules: Rules, counts: Counts
) -> Iterator[tuple[list[int], list[int]]]:
    """The sample in pieces of at most sequence_len tokens, without those that have nothing to train on."""
    input_ids, labels = sample
    n, most = len(input_ids), rules.sequence_len
    counts.longest = max(counts.longest, n)
    if n > most and not prompt_type.splits:
        if rules.excess_length_strategy == "raise":
            raise DataError(f"{where}: {n} tokens, more than sequence_len: {most}")
        if rules.excess_length_strategy == "drop":
            counts.dropped_too_long += 1
            return
        counts.truncated += 1
        n = most
    for start in range(0, n, most):
        part = slice(start, min(start + most, n))
        # the first label has no token before it to be predicted from
        if all(label == IGNORED for label in labels[part][1:]):
            counts.dropped_untrained += 1
        else:
            yield input_ids[part], labels[part]


def schema() -> pyarrow.Schema:
    """Of the tables."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema([("input_ids", ids), ("labels", ids), ("length", pa.int32())])


def _table(samples: Sequence[tuple[list[int], list[int]]], counts: Counts) -> pyarrow.Table:
    import numpy as np
    import pyarrow as pa

    lengths = np.array([len(ids) for ids, _ in samples], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]).astype(np.int32)

    def column(which: int) -> Any:
        flat = np.fromiter(
            itertools.chain.from_iterable(s[which] for s in samples), np.int32, int(offsets[-1])
        )
        return flat, pa.ListArray.from_arrays(offsets, flat)

    _, input_ids = column(0)
    flat_labels, labels = column(1)
    counts.samples += len(samples)
    counts.tokens += int(offsets[-1])
    counts.trained_tokens += int((flat_labels != IGNORED).sum())
    return pa.table({"input_ids": input_ids, "labels": labels, "length": lengths}, schema())
