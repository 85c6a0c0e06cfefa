"""`fastlora preprocess`: what it says of the data, shows of it and writes, and that it is found again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from pyfastlora.cli.preprocess import preprocess
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.data import store
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.model import load_tokenizer


@pytest.fixture
def run():
    def call(*arguments: object):
        return CliRunner().invoke(preprocess, [str(a) for a in arguments], catch_exceptions=False)

    return call


def test_the_report_counts_what_is_there(run, config_file, write_jsonl, alpaca_rows, tmp_path, monkeypatch):
    rows = [*alpaca_rows, {"instruction": "x " * 300, "output": "y"}, {"instruction": "none"}]
    config = config_file(write_jsonl(rows), "on_bad_row: skip\nval_set_size: 4\n")
    result = run(config, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "report/report.json").read_text())
    loaded = load_config(config).config
    monkeypatch.setattr(store, "tokenise", None)  # it is prepared, and would not be again
    data = prepare(loaded, load_tokenizer(loaded))
    for name, part in (("train", data.train), ("held_out", data.held_out)):
        samples, said = part[:], found[name]
        lengths = [len(ids) for ids in samples["input_ids"]]
        trained = sum(label != IGNORED for labels in samples["labels"] for label in labels)
        assert said["samples"] == len(lengths) and said["tokens"] == sum(lengths)
        assert said["trained_tokens"] == trained
        assert said["duplicates"] == len(lengths) - len({tuple(ids) for ids in samples["input_ids"]})
        assert said["lengths"]["median"] == int(np.median(lengths)) and said["lengths"]["most"] == max(
            lengths
        )
    (counts,) = found["datasets"].values()
    assert (counts["rows"], counts["bad_rows"], counts["dropped_too_long"]) == (26, 1, 1)
    assert (tmp_path / "report/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "held_out: 4 samples" in result.stdout and "1 dropped as longer" in result.stdout


def test_samples_are_shown_with_what_is_trained(run, config_file, write_jsonl, alpaca_rows):
    result = run(config_file(write_jsonl(alpaca_rows)), "--show", "2", "--lora-r", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("### Instruction:") == 2 and "sample 1: " in result.stdout
    assert "### Response:\n«hello </s>»" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--set", "datasets[0].path=nowhere.jsonl"), 3, "nowhere.jsonl: no such file"),
        (("--seqence-len", "3"), 2, "seqence_len: unknown key; did you mean sequence_len? (data keys)"),
        (("--base-model", "./nowhere"), 1, "base_model: ./nowhere: no such folder"),
    ],
)
def test_mistakes_have_a_sentence_and_a_code(
    run, config_file, write_jsonl, alpaca_rows, arguments, code, sentence
):
    result = run(config_file(write_jsonl(alpaca_rows)), *arguments)
    assert result.exit_code == code and sentence in result.stderr and "Traceback" not in result.stderr


def test_a_report_is_not_written_over_another(run, config_file, write_jsonl, alpaca_rows, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/mine.txt").write_text("keep")
    result = run(config_file(write_jsonl(alpaca_rows)), "--report", tmp_path / "report")
    assert result.exit_code == 2 and "--report: " in result.stderr and "is not empty" in result.stderr
    assert [f.name for f in (tmp_path / "report").iterdir()] == ["mine.txt"]
