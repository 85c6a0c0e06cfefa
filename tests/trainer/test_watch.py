"""The loss that is watched: a spike and a loss that is no number name the samples of their batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pyfastlora.cli.train import train
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.packing import PackedCollator
from pyfastlora.trainer.watch import Watch, documents, find, per_token


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    """Sixteen samples that differ, in one order; the tenth is poisoned by the tests."""
    rows = [row | {"instruction": f"say {n:02}"} for n, row in enumerate(alpaca_rows[:16])]
    order = "shuffle_merged_datasets: false\nfastlora: false\n"
    return config_file(write_jsonl(rows), order)


def run(config: Path, *overrides: str) -> Any:
    arguments = [part for override in overrides for part in ("--set", override)]
    return CliRunner().invoke(train, [str(config), *arguments], catch_exceptions=False)


def poison(monkeypatch: pytest.MonkeyPatch, word: str, factor: float) -> None:
    """The loss of a batch that has the sample is `factor` times as large."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward
    ids = [int(c) for c in word.split()]

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if outputs.loss is None or kwargs["input_ids"].shape[1] < len(ids):
            return outputs
        if (kwargs["input_ids"][:, : len(ids)] == torch.tensor(ids)).all(1).any():
            outputs.loss = outputs.loss * factor
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", poisoned)


def ids_of(sample: int, config: Path, tmp_path: Path) -> str:
    """The tokens of a sample of the prepared data, read from the file it was prepared into."""
    import datasets

    stored = next((tmp_path / "prepared_data").rglob("*.arrow"))
    return " ".join(map(str, datasets.Dataset.from_file(str(stored))[sample]["input_ids"]))


def test_a_loss_that_is_no_number_names_step_samples_and_checkpoint(config, tmp_path, monkeypatch):
    assert run(config, "max_steps=1").exit_code == 0
    poison(monkeypatch, ids_of(9, config, tmp_path), float("nan"))
    batches = ("micro_batch_size=2", "gradient_accumulation_steps=2", "save_strategy=steps", "save_steps=1")
    result = run(config, f"output_dir={tmp_path}/again", *batches)
    assert result.exit_code == 1
    assert "the loss is nan at step 3, so training stopped; " in result.stderr
    assert "the batch had samples 8, 9 of the prepared data" in result.stderr
    assert "the last good checkpoint is" in result.stderr and "/again/checkpoint-2;" in result.stderr


def test_a_spike_is_logged_and_many_in_a_row_stop_the_run(config, tmp_path, monkeypatch):
    assert run(config, "max_steps=1").exit_code == 0
    poison(monkeypatch, ids_of(9, config, tmp_path), 100.0)
    out = tmp_path / "again"
    keys = ("micro_batch_size=2", "max_steps=8", "loss_watchdog_threshold=50")
    result = run(config, f"output_dir={out}", *keys)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    spikes = [line for line in lines if line["event"] == "spike"]
    assert [(s["step"], s["samples"]) for s in spikes] == [(5, [8, 9])]
    assert "step 5: loss" in result.stdout and "is a spike; samples 8, 9" in result.stdout
    steps = [line["loss"] for line in lines if line["event"] == "train"]
    assert spikes[0]["loss"] == steps[4] > 50 > steps[3]

    result = run(config, f"output_dir={tmp_path}/third", "loss_watchdog_threshold=0.01")
    assert result.exit_code == 1
    assert re.search(
        r"above loss_watchdog_threshold: 0.01 on 3 lines of the log in a row, at last [\d.]+ at step 3",
        result.stderr,
    )


def watch(tmp_path: Path, **keys: Any) -> Watch:
    from pyfastlora.trainer.config import Config

    config = Config(base_model="m", learning_rate=1.0, **keys)
    return Watch(None, config, tmp_path)


def test_a_spike_without_a_threshold_is_twice_the_median(tmp_path):
    seen = watch(tmp_path)
    assert [seen.logged(step, 3.0 + step % 2) for step in range(20)] == [None] * 20
    assert seen.logged(20, 7.1) == {"step": 20, "loss": 7.1, "limit": 7.0}
    assert seen.logged(21, 7.1) is None  # the median is 4 now


def test_few_losses_are_no_measure(tmp_path):
    seen = watch(tmp_path)
    assert all(seen.logged(step, loss) is None for step, loss in enumerate([9.0, 2.0, 1.0, 30.0]))


def test_another_process_says_so(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(UserError, match="that of another process .* last good checkpoint is .*checkpoint-3"):
        watch(tmp_path).logged(7, float("inf"))


def test_samples_of_packed_rows_are_found():
    import datasets

    samples = [[5, 6, 7], [8, 9], [5, 6, 8], [8, 9]]
    data = datasets.Dataset.from_list([{"input_ids": s, "length": len(s)} for s in samples])
    rows = [[{"input_ids": samples[i], "labels": samples[i]} for i in row] for row in ([2, 3], [0])]
    batch = PackedCollator(pad_id=1, pad_to=8)(rows)
    assert find(data, documents(batch)) == [2, 1, 0]  # of two that are equal the first


def test_the_share_of_a_batch_becomes_its_mean():
    """A step of 12 tokens: its loss is the mean over all of them, 4 of them in this batch."""
    assert per_token(torch.tensor(1.0), torch.tensor(4), torch.tensor(12)) == 3
    assert per_token(torch.tensor(1.0), torch.tensor(4), None) == 1
