"""`fastlora evaluate`: its numbers against the trainer's and against their definition, sample by sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pyfastlora.cli.evaluate import evaluate
from pyfastlora.cli.merge_lora import merge_lora
from pyfastlora.cli.train import train
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.loading import Choice, load


def call(command: Any, config: Path, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(config), *map(str, arguments)], catch_exceptions=False)


def measured(config: Path, *arguments: object) -> dict[str, Any]:
    result = call(evaluate, config, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    """With two sets held out, of which one counts twice."""
    other = [{"instruction": "sing " * n, "output": "la " * (7 * n)} for n in range(1, 4)]
    test = f"  - path: {write_jsonl(alpaca_rows[:5], 'a.jsonl')}\n    type: alpaca\n"
    test += f"  - path: {write_jsonl(other, 'b.jsonl')}\n    type: alpaca\n    weight: 2\n"
    return config_file(write_jsonl(alpaca_rows), f"test_datasets:\n{test}sample_packing: true\n")


def by_definition(config: Path, choice: Choice) -> dict[str, float]:
    """Sample by sample: whole logits, float64."""
    loaded = load_config(config).config
    found = load(loaded, choice)
    nats, right, count = 0.0, 0, 0
    for sample in prepare(loaded, found.tokenizer).held_out:
        with torch.no_grad():
            logits = found.model(torch.tensor([sample["input_ids"]])).logits[0, :-1].double()
        targets = torch.tensor(sample["labels"][1:])
        kept = targets != IGNORED
        scores = logits[kept].log_softmax(-1)
        nats -= scores.gather(1, targets[kept][:, None]).sum().item()
        right += int((scores.argmax(-1) == targets[kept]).sum())
        count += int(kept.sum())
    return {"loss": nats / count, "accuracy": right / count, "trained_tokens": count}


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_the_numbers_are_the_trainers(config, tmp_path, adapter):
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    keys = ("--set", f"adapter={adapter}")
    kept = ("save_strategy=steps", "save_steps=3")
    result = call(train, config, *keys, *(p for k in kept for p in ("--set", k)), "--eval-steps", 3)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    middle, end = (line["eval_loss"] for line in lines if line["event"] == "eval")
    found = measured(config, *keys)
    assert found["all"]["loss"] == pytest.approx(end, rel=1e-5)  # packed there, padded here
    assert measured(config, *keys, "--checkpoint", 3)["all"]["loss"] == pytest.approx(middle, rel=1e-5)
    assert abs(middle - end) > 0.01
    if adapter == "lora":
        for choice, option in ((Choice(), ()), (Choice(base=True), ("--base",))):
            exact, said = by_definition(config, choice), measured(config, *option)
            assert said["all"]["loss"] == pytest.approx(exact["loss"], rel=1e-5)
            assert said["all"]["accuracy"] == exact["accuracy"]
            assert said["all"]["trained_tokens"] == exact["trained_tokens"]
        assert said["all"]["loss"] > end + 0.1  # the last is the base

    a, b = found["datasets"].values()
    assert (a["samples"], b["samples"]) == (5, 6)
    weighted = a["loss"] * a["trained_tokens"] + b["loss"] * b["trained_tokens"]
    assert found["all"]["loss"] == pytest.approx(weighted / found["all"]["trained_tokens"])
    assert a["perplexity"] == pytest.approx(math.exp(a["loss"]))

    assert call(merge_lora, config, *keys).exit_code == 0
    assert measured(config, *keys, "--merged")["all"]["loss"] == pytest.approx(end, rel=1e-4)
    table = call(evaluate, config, *keys).stdout.splitlines()
    assert [line.split()[0] for line in table[3:]] == ["test_datasets[0]", "test_datasets[1]", "all"]
    assert f"{found['all']['loss']:.4f}" in table[-1]


def test_a_share_is_told_apart_by_dataset(config_file, write_jsonl, alpaca_rows, tmp_path):
    """val_set_size holds samples of all datasets out; the parts are those of the trainer, shards too."""
    more = write_jsonl([{"instruction": f"n{n}", "output": "la"} for n in range(9)], "more.jsonl")
    extra = "val_set_size: 8\ndataset_shard_num: 2\ndataset_shard_idx: 1\n"
    config = config_file(write_jsonl(alpaca_rows), extra)
    config.write_text(
        config.read_text().replace("adapter: lora", f"  - path: {more}\n    type: alpaca\nadapter: lora")
    )
    found = measured(config, "--base")
    exact = by_definition(config, Choice(base=True))
    assert found["all"]["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    assert found["all"]["samples"] == 8 and len(found["datasets"]) == 2


def test_a_model_without_adapter_is_evaluated_where_it_is(config, tmp_path):
    plain = [line for line in config.read_text().splitlines() if not line.startswith(("adapter", "lora_"))]
    config.write_text("\n".join(plain) + "\n")
    assert call(train, config, "--learning-rate", "1e-3").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    *_, loss = (line["eval_loss"] for line in lines if line["event"] == "eval")
    assert measured(config)["all"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "output_dir: {tmp}/out: no such folder; an adapter of PEFT's format is needed"),
        (("--merged",), 2, "--merged: {tmp}/out/merged holds no model; `fastlora merge-lora` makes it"),
        (("--base", "--merged", "x"), 2, "--base and --merged mean different models; keep one"),
        (
            ("--set", "test_datasets="),
            2,
            "nothing is held out to evaluate: set test_datasets or val_set_size",
        ),
        (("--set", "test_datasets[0].path=none.jsonl", "--base"), 3, "none.jsonl: no such file"),
    ],
)
def test_mistakes(config, tmp_path, arguments, code, sentence):
    result = call(evaluate, config, *arguments)
    assert result.exit_code == code and sentence.format(tmp=tmp_path) in result.stderr, result.stderr


def test_memory_that_does_not_suffice_is_told(config, monkeypatch):
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr("pyfastlora.trainer.evaluation._score", full)
    result = call(evaluate, config, "--base")
    said = "Error: out of memory: CUDA out of memory. Tried to allocate 9.00 GiB.; a smaller eval_batch_size"
    assert result.exit_code == 1 and result.stderr.startswith(said)
