"""Tokens and labels of every prompt type, against text spelled out here."""

from __future__ import annotations

import pytest

from pyfastlora.trainer.config import DatasetKeys
from pyfastlora.trainer.data.registry import prompt_type
from pyfastlora.trainer.data.sources import NumberedRow
from pyfastlora.trainer.data.tokenise import IGNORED, Counts, Rules, tokenise
from pyfastlora.trainer.errors import DataError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet.\n\n### Input:\nloudly\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet.\n\n### Response:\n"
)


def entry(kind, **keys):
    return DatasetKeys(path="-", type=kind, **keys)


def samples(tokenizer, rows, kind="alpaca", field=None, counts=None, keys=None, **rules):
    numbered = [NumberedRow(f"data.jsonl:{i}", row) for i, row in enumerate(rows, 1)]
    tables = tokenise(
        numbered,
        prompt_type(entry(kind, field=field, **(keys or {})), tokenizer),
        tokenizer,
        Rules(**{"sequence_len": 512, **rules}),
        counts or Counts(),
    )
    return [row for table in tables for row in table.to_pylist()]


def read(tokenizer, sample):
    """The whole text and the trained text of a sample, special tokens included."""
    assert len(sample["input_ids"]) == len(sample["labels"]) == sample["length"]
    assert all(b in (a, IGNORED) for a, b in zip(sample["input_ids"], sample["labels"], strict=True))
    trained = [label for label in sample["labels"] if label != IGNORED]
    return tokenizer.decode(sample["input_ids"]), tokenizer.decode(trained)


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "Greet.", "input": "loudly", "output": "HELLO"}, WITH_INPUT),
        ({"instruction": "Greet.", "input": "", "output": "HELLO"}, WITHOUT_INPUT),
        ({"instruction": "Greet.", "input": None, "output": "HELLO"}, WITHOUT_INPUT),
        ({"instruction": "Greet.", "output": "HELLO", "id": 3}, WITHOUT_INPUT),
    ],
    ids=["input", "empty input", "null input", "no input"],
)
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("eos", [True, False], ids=["eos", "no eos"])
def test_alpaca(make_tokenizer, row, prompt, bos, eos):
    tokenizer = make_tokenizer(bos, eos)
    (sample,) = samples(tokenizer, [row])
    start, end = "<s>" if bos else "", "</s>" if eos else ""
    assert read(tokenizer, sample) == (start + prompt + "HELLO" + end, "HELLO" + end)


def test_alpaca_trained_on_inputs(make_tokenizer):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [{"instruction": "Greet.", "output": "HELLO"}], train_on_inputs=True)
    whole = "<s>" + WITHOUT_INPUT + "HELLO</s>"
    assert read(tokenizer, sample) == (whole, whole)


def test_prompt_tokens_do_not_depend_on_the_response(make_tokenizer):
    tokenizer = make_tokenizer()
    a, b = samples(tokenizer, [{"instruction": "Greet.", "output": o} for o in ("\nthe", "x")])
    n = a["labels"].index(next(label for label in a["labels"] if label != IGNORED))
    assert a["input_ids"][:n] == b["input_ids"][:n] and b["labels"][n] != IGNORED


@pytest.mark.parametrize(
    "text", ["你好, naïve café 🦊", "a\r\nb\r\n", "  spaces  ", "\u2028line\u2029", "x" * 3000]
)
def test_text_survives(make_tokenizer, text):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [{"instruction": text, "output": text}], sequence_len=10_000)
    whole, trained = read(tokenizer, sample)
    assert trained == text + "</s>" and f"### Instruction:\n{text}\n\n" in whole


def test_rows_that_do_not_fit_can_be_skipped(make_tokenizer):
    counts, good = Counts(), {"instruction": "Greet.", "output": "HELLO"}
    rows = [good, {"instruction": "Greet."}, good, "text", {"instruction": 3, "output": "x"}]
    kept = samples(make_tokenizer(), rows, counts=counts, on_bad_row="skip")
    assert len(kept) == 2 and (counts.rows, counts.samples, counts.bad_rows) == (5, 2, 3)
    assert counts.first_bad.startswith('data.jsonl:2: type alpaca needs "instruction" and "output"')
    with pytest.raises(DataError, match=r"data\.jsonl:2: "):
        samples(make_tokenizer(), rows)


def test_completion_is_trained_whole(make_tokenizer):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [{"text": "the fox says hello"}], "completion")
    assert read(tokenizer, sample) == ("<s>the fox says hello</s>",) * 2


def test_completion_with_a_field_of_another_name(make_tokenizer):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [{"body": "the fox", "text": "not this"}], "completion", field="body")
    assert read(tokenizer, sample)[0] == "<s>the fox</s>"


def test_long_completion_is_split_and_nothing_lost(make_tokenizer):
    tokenizer, text = make_tokenizer(), "the fox says hello " * 40
    parts = samples(tokenizer, [{"text": text}], "completion", sequence_len=16)
    assert len(parts) > 5 and all(p["length"] == 16 for p in parts[:-1])
    assert tokenizer.decode([i for p in parts for i in p["input_ids"]]) == f"<s>{text}</s>"


def test_a_last_part_of_one_token_has_nothing_to_predict(make_tokenizer):
    tokenizer, counts = make_tokenizer(), Counts()
    n = len(tokenizer("the fox")["input_ids"]) + 1  # with </s>
    parts = samples(tokenizer, [{"text": "the fox"}], "completion", counts=counts, sequence_len=n - 1)
    assert len(parts) == 1 and counts.dropped_untrained == 1


def test_longer_than_sequence_len(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"instruction": "Greet.", "output": "HELLO"}, {"instruction": "Greet. " * 99, "output": "HELLO"}]
    n = samples(tokenizer, rows[:1])[0]["length"]

    counts = Counts()
    assert len(samples(tokenizer, rows, counts=counts, sequence_len=n)) == 1
    assert (counts.rows, counts.samples, counts.dropped_too_long) == (2, 1, 1)

    with pytest.raises(DataError, match=rf"data.jsonl:2: \d+ tokens, more than sequence_len: {n}"):
        samples(tokenizer, rows, sequence_len=n, excess_length_strategy="raise")

    counts = Counts()
    short = [{"instruction": "Greet.", "output": "HELLO " * 20}]
    (cut,) = samples(tokenizer, short, counts=counts, sequence_len=n, excess_length_strategy="truncate")
    assert cut["length"] == n and counts.truncated == 1


def test_counts_add_up(make_tokenizer):
    tokenizer, counts = make_tokenizer(), Counts()
    found = samples(tokenizer, [{"instruction": "Greet.", "output": "HELLO"}] * 1500, counts=counts)
    assert counts.rows == counts.samples == 1500 == len(found)
    assert counts.tokens == sum(s["length"] for s in found)
    assert counts.trained_tokens == sum(label != IGNORED for s in found for label in s["labels"])


@pytest.mark.parametrize(
    "row, kind, sentence",
    [
        (
            {"prompt": "a", "reply": "b"},
            "alpaca",
            'data.jsonl:1: type alpaca needs "instruction" and "output"; this row has "prompt", "reply"',
        ),
        (
            {"text": "a"},
            "alpaca",
            'type alpaca needs "instruction" and "output"; this row has "text" (type: completion would fit)',
        ),
        ({"instruction": "a", "output": "b"}, "completion", "(type: alpaca would fit)"),
        ({"instruction": "a", "output": None}, "alpaca", 'needs "instruction" and "output"'),
        ({"instruction": "a", "output": 5}, "alpaca", 'data.jsonl:1: "output" must be text; got int'),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "alpaca", '"input" must be text; got list'),
        ({"text": "a\ud800b"}, "completion", '"text" has half of a surrogate pair'),
        ({}, "completion", 'type completion needs "text"; this row has no fields'),
        ([1], "completion", "data.jsonl:1: must be an object with fields; got list"),
        ("text", "completion", "data.jsonl:1: must be an object with fields; got str"),
        ({f"f{i}": 1 for i in range(99)}, "completion", "and 87 more"),
    ],
)
def test_bad_rows(make_tokenizer, row, kind, sentence):
    with pytest.raises(DataError) as error:
        samples(make_tokenizer(), [row], kind)
    assert sentence in str(error.value) and error.value.exit_code == 3
