"""pretraining_dataset: every sample once a pass, in another order each time, and never more than a buffer."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pyfastlora.cli.preprocess import preprocess
from pyfastlora.cli.train import train
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.stream import Stream
from pyfastlora.trainer.errors import DataError


def config(*entries: Any, **more: Any) -> Config:
    keys = {"base_model": "-", "learning_rate": 1e-4, "adapter": "lora", "max_steps": 9, "sequence_len": 16}
    return Config.model_validate(keys | {"pretraining_dataset": list(entries)} | more)


def texts(samples: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]


@pytest.fixture
def words(write_jsonl) -> Path:
    return write_jsonl([{"text": f"{n} word"} for n in range(50)])


def test_every_sample_once_a_pass_and_each_pass_in_another_order(words, make_tokenizer):
    tokenizer = make_tokenizer()
    stream = Stream(config({"path": str(words)}, streaming_multipack_buffer_size=7), tokenizer)
    first, second = (texts(stream, tokenizer) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"{n} word" for n in range(50))
    assert first != second and stream.counts["pretraining_dataset[0]"].rows == 100
    again = Stream(config({"path": str(words)}, streaming_multipack_buffer_size=7), tokenizer)
    assert texts(again, tokenizer) == first
    kept = Stream(config({"path": str(words)}, shuffle_merged_datasets=False), tokenizer)
    assert texts(kept, tokenizer) == [f"{n} word" for n in range(50)]


def test_samples_are_those_of_completion(words, make_tokenizer, write_jsonl):
    """BOS, text, EOS, trained on throughout; a long one in pieces of sequence_len."""
    tokenizer = make_tokenizer()
    text = " ".join(map(str, range(60)))
    long = write_jsonl([{"body": text}], "long.jsonl")
    samples = list(Stream(config({"path": str(long), "text_column": "body"}), tokenizer))
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    pieces = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    assert sorted(sample["input_ids"] for sample in samples) == sorted(pieces) and len(pieces) > 5
    assert all(sample["labels"] == sample["input_ids"] for sample in samples)


def test_packed_rows_hold_every_sample(words, make_tokenizer):
    tokenizer = make_tokenizer()
    stream = Stream(config({"path": str(words)}, sample_packing_bin_size=3), tokenizer, packed=True)
    rows = list(stream)
    assert all(1 <= len(row) <= 3 and sum(len(s["input_ids"]) for s in row) <= 16 for row in rows)
    assert len(rows) < 50 and sorted(texts(itertools.chain(*rows), tokenizer)) == sorted(
        f"{n} word" for n in range(50)
    )


def test_no_more_is_read_than_is_needed(tmp_path, make_tokenizer):
    """The line that is not JSON lies behind the first buffer."""
    path = tmp_path / "big.jsonl.gz"
    lines = [json.dumps({"text": f"{n} word"}) for n in range(3000)]
    path.write_bytes(gzip.compress("\n".join([*lines, "{not JSON"]).encode()))
    stream = Stream(config({"path": str(path)}, streaming_multipack_buffer_size=1000), make_tokenizer())
    stream.check()
    assert len(list(itertools.islice(stream, 1000))) == 1000
    with pytest.raises(DataError, match=r"big.jsonl.gz:3001: not JSON"):
        list(stream)


def test_entries_take_turns_and_rows_can_be_skipped(write_jsonl, make_tokenizer):
    tokenizer = make_tokenizer()
    paths = [write_jsonl([{"text": f"{name}{n}"} for n in range(2000)], f"{name}.jsonl") for name in "ab"]
    given = [{"path": str(paths[0])}, {"path": str(paths[1]), "skip": 1500}]
    stream = Stream(config(*given, streaming_multipack_buffer_size=1500), tokenizer)
    found = texts(stream, tokenizer)
    assert len(found) == 2500 and {text[0] for text in found[:1500]} == {"a", "b"}
    assert "b1500" in found and "b1499" not in found


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [([], "has no text"), ([{"body": "x"}], 'needs "text"; this row has "body"'), (["{"], "not JSON")],
)
def test_what_cannot_be_trained_on_is_told_before_training(write_jsonl, make_tokenizer, rows, sentence):
    with pytest.raises(DataError, match=sentence):
        Stream(config({"path": str(write_jsonl(rows))}), make_tokenizer()).check()


def job(config_file: Any, data: Path, **keys: Any) -> Path:
    path = config_file(data)
    written = yaml.safe_load(path.read_text())
    del written["datasets"]
    keys = {"save_strategy": "no", "pretraining_dataset": str(data)} | keys
    path.write_text(yaml.safe_dump(written | keys))
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_trains_past_the_end_of_the_data(words, config_file, tmp_path, packed):
    """Twenty steps of four rows: the data ends and begins again; what was read is in the report."""
    keys = {"max_steps": 20, "sample_packing": packed, "adapter": None, "lora_target_linear": False}
    keys |= {"lora_r": 8, "lora_alpha": 8, "learning_rate": 1e-3, "sequence_len": 64}
    path = job(config_file, words, **keys, test_datasets=[{"path": str(words), "type": "completion"}])
    done = CliRunner().invoke(train, [str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "pretraining_dataset is read as it is needed, 50 held out" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    (counts,) = [
        c
        for k, c in json.loads((tmp_path / "out" / "data.json").read_text())["datasets"].items()
        if "pre" in k
    ]
    assert counts["rows"] >= 100 and (tmp_path / "out" / "model.safetensors").exists()


def test_a_look_at_the_samples(words, config_file):
    done = CliRunner().invoke(
        preprocess, [str(job(config_file, words)), "--show", "3"], catch_exceptions=False
    )
    assert done.exit_code == 0 and done.stdout.count("word") == 3, done.output
