"""kill -9 at fifty random moments: no checkpoint is ever half there, and the end is the one without."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyfastlora.trainer.checkpoints import checkpoints, step_of

from . import killed_run

KILLS, STEPS, SAVE_STEPS = 50, 12, 2


SETTINGS = (
    *(f"max_steps={STEPS}", "save_strategy=steps", f"save_steps={SAVE_STEPS}", "save_total_limit=2"),
    *("sample_packing=true", "micro_batch_size=2", "lora_dropout=0.1"),
)


def start(config: Path, out: Path) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_run.__name__])
    settings = [*SETTINGS, f"dataset_prepared_path={config.parent}/prepared", f"output_dir={out}"]
    process = context.Process(target=killed_run.run, args=(str(config), settings))
    process.start()
    return process


def assert_whole(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == step_of(checkpoint)
    assert len(load_file(checkpoint / "adapter_model.safetensors")) == 28
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert json.loads((checkpoint / "fastlora.json").read_text())["fingerprint"]


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


def test_fifty_kills(write_jsonl, alpaca_rows, config_file, tmp_path, monkeypatch):
    tests = Path(__file__).parents[1]  # where the server of forks looks for what it imports once
    monkeypatch.setenv("PYTHONPATH", f"{tests}{os.pathsep}{tests.parent}")
    config = config_file(write_jsonl(alpaca_rows))
    alone, took = tmp_path / "alone", 0.0
    for out in (tmp_path / "first", alone):  # the first one waits for the imports
        began = time.monotonic()
        process = start(config, out)
        process.join()
        assert process.exitcode == 0
        took = time.monotonic() - began

    moments = random.Random(0)
    number, out, newest, ended = 0, tmp_path / "run-0", 0, []
    for _ in range(KILLS):
        process = start(config, out)
        process.join(moments.uniform(0.2, 1.0) * took)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        finished = process.exitcode == 0
        there = checkpoints(out)
        for checkpoint in there:
            assert_whole(checkpoint)
        if there:
            assert step_of(there[-1]) >= newest  # never further back than before
            newest = step_of(there[-1])
        if finished:
            ended.append(out)
            number, newest = number + 1, 0
            out = tmp_path / f"run-{number}"
        elif out.exists() and (out / "log.jsonl").exists() and losses(out):
            assert losses(out)[-1][0] - newest <= SAVE_STEPS
    process = start(config, out)
    process.join()
    assert process.exitcode == 0
    for whole in [*ended, out]:
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (alone, whole))
        assert all(tensor.equal(other[name]) for name, tensor in one.items())
        assert losses(whole) == losses(alone) and len(losses(whole)) == STEPS
        assert not list(whole.glob(".checkpoint*"))
