"""`fastlora init`: what it makes of rows and models is valid, says what was seen, and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pyfastlora.cli.init import init
from pyfastlora.cli.train import train
from pyfastlora.trainer.config import Config, TemplateKeys
from pyfastlora.trainer.config.load import load_config


def start(*arguments: object) -> Result:
    return CliRunner().invoke(init, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def begun(tiny_model, write_jsonl, tmp_path, monkeypatch):
    """begun(rows, *options): the configuration that is written, in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def run(rows: list[Any], *options: object) -> Config:
        data = write_jsonl(rows)
        result = start("--base-model", tiny_model, "--dataset", data, *options)
        assert result.exit_code == 0, result.stderr
        return load_config("cfg.yaml").config

    return run


USER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
HUMAN = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(
    ("row", "kind", "more"),
    [
        ({"instruction": "i", "output": "o", "text": "t"}, "alpaca", {}),
        ({"text": "t", "id": 3}, "completion", {}),
        ({"question": "q", "answer": "a"}, "alpaca_chat.load_qa", {}),
        (
            {"prompt": "q", "completion": "a"},
            None,
            {"field_instruction": "prompt", "field_output": "completion"},
        ),
        ({"ask me": "q", "no": "a", "n": 1}, None, {"field_instruction": "ask me", "field_output": "no"}),
        ({"x": "t", "y": "t", "query": "q", "answer": "a"}, None, {"field_instruction": "query"}),
        ({"messages": USER}, "chat_template", {"field_messages": None}),
        ({"chat": USER}, "chat_template", {"field_messages": "chat"}),
        ({"conversations": HUMAN}, "sharegpt", {"field_messages": None}),
        ({"messages": HUMAN}, "sharegpt", {"field_messages": "messages"}),
        ({"input_ids": [3, 4], "labels": [3, 4]}, "", {}),
    ],
)
def test_the_first_row_decides_the_type(begun, row, kind, more):
    (entry,) = begun([row] * 3).datasets
    if kind is None:
        assert isinstance(entry.type, TemplateKeys)
        entry = entry.type
    else:
        assert entry.type == (kind or None)
    assert {key: getattr(entry, key) for key in more} == more


def test_what_is_seen_decides_the_values(begun, tmp_path):
    rows = [{"text": "word " * 1300}, *[{"text": "t"}] * 30]
    config = begun(rows, "--adapter", "qlora")
    assert (
        config.sequence_len == 2048
    )  # the model has no more positions; 6500 characters are about 2166 tokens
    assert config.adapter == "qlora" and config.val_set_size == 0.05
    text = (tmp_path / "cfg.yaml").read_text()
    assert (
        "llama, positions for 2048 tokens" in text and "longest of the first 31 rows has about 2166" in text
    )
    assert all(
        "#" in line for line in text.splitlines() if line.startswith(("lora_r", "learning_rate", "bf16"))
    )


@pytest.mark.parametrize("kind", ["lora", "qlora", "dora", "full"])
def test_it_trains(begun, alpaca_rows, tmp_path, kind):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    rows = alpaca_rows if kind != "dora" else [{"messages": USER}] * 24
    begun(rows, "--adapter", kind)
    faster = ["--learning-rate", "1e-2", "--max-steps", "5", "--micro-batch-size", "8", "--bf16", "false"]
    faster += ["--gradient-checkpointing", "false", "--eval-strategy", "no", "--evals-per-epoch", ""]
    done = CliRunner().invoke(
        train, ["cfg.yaml", *faster, "--sample-packing", "false"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "outputs/cfg/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    assert (
        (tmp_path / "outputs/cfg" / ("model" if kind == "full" else "adapter_model"))
        .with_suffix(".safetensors")
        .exists()
    )
    settings = tmp_path / "outputs/cfg/adapter_config.json"
    assert kind == "full" or json.loads(settings.read_text())["use_dora"] == (kind == "dora")


def test_nothing_is_written_over(begun, tmp_path, tiny_model):
    (tmp_path / "cfg.yaml").write_text("mine")
    result = start("--base-model", tiny_model, "--dataset", "x.jsonl")
    assert result.exit_code == 2 and "cfg.yaml is there already; choose another name" in result.stderr
    assert (tmp_path / "cfg.yaml").read_text() == "mine"


def test_what_is_on_the_hub_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = ("--base-model", "owner/model", "--dataset", "owner/data")
    result = start(*hub)
    assert result.exit_code == 3 and "without its first row, say what it is with --type" in result.stderr
    assert start(*hub, "--type", "chat_template").exit_code == 0
    config = load_config("cfg.yaml").config
    assert (config.base_model, config.datasets[0].path) == ("owner/model", "owner/data")
    assert config.chat_template == "tokenizer_default_fallback_chatml"


@pytest.mark.parametrize(
    ("rows", "arguments", "code", "sentence"),
    [
        ([{"a": 1, "b": "t"}], (), 3, 'data.jsonl:1: no type fits a row with "a", "b"; say it with --type'),
        (["5"], (), 3, "data.jsonl:1: must be an object with fields; got int"),
        ([], (), 3, "has no rows"),
        ([{"text": "t"}], ("--type", "alpacca"), 2, "did you mean alpaca?"),
        ([{"text": "t"}], ("--base-model", "./nowhere"), 1, "--base-model: ./nowhere: no such folder"),
        ([{"text": "t"}], ("--base-model", "."), 1, "--base-model: . has no config.json"),
    ],
)
def test_mistakes(write_jsonl, tmp_path, monkeypatch, tiny_model, rows, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    result = start("--base-model", tiny_model, "--dataset", write_jsonl(rows), *arguments)
    assert result.exit_code == code and sentence in result.stderr, result.stderr
    assert not Path("cfg.yaml").exists()
