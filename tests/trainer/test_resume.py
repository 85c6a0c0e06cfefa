"""A run that is stopped and gone on with ends as the one that was not: weights, losses and all.

What could break: random state, data order, the schedule or what was counted since the last logged step; a
checkpoint that is half there; a run gone on with that is not the same any more.
"""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from pyfastlora.cli.train import train
from pyfastlora.trainer import job
from pyfastlora.trainer.checkpoints import checkpoints, clean, rotate
from pyfastlora.trainer.record import MEASURED


def invoke(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(train, [str(config), *arguments], catch_exceptions=False)


def run(config: Path, *arguments: str) -> str:
    result = invoke(config, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def weights(out: Path) -> dict:
    return load_file(out / "adapter_model.safetensors")


def curve(out: Path) -> list[dict]:
    """What was logged, without times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("time", "eval_seconds", *MEASURED)
    return [{k: v for k, v in x.items() if k not in timed} for x in lines if x["event"] in ("train", "eval")]


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name
        assert "lora_B" not in name or tensor.abs().sum() > 0
    assert curve(one) == curve(other)


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    """Twenty-four samples of different lengths, with dropout and accumulation."""
    held_out = write_jsonl(alpaca_rows[:5], "held_out.jsonl")
    return config_file(
        write_jsonl(alpaca_rows),
        f"test_datasets:\n  - path: {held_out}\n    type: alpaca\n"
        "lora_dropout: 0.2\ngradient_accumulation_steps: 2\nfastlora: false\n",
    )


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    stepped = job.Progress.stepped

    def then(self, at: int) -> None:
        stepped(self, at)
        if at == step:
            signal.raise_signal(number)

    monkeypatch.setattr(job.Progress, "stepped", then)


CASES = {
    "mid-epoch, between two logged steps": ("max_steps=8", "logging_steps=3"),
    "packed": ("max_steps=8", "sample_packing=true", "sequence_len=128", "micro_batch_size=1"),
    "evaluations between": ("max_steps=8", "eval_steps=2", "eval_strategy=steps"),
    "fused, DoRA": ("max_steps=6", "fastlora=true", "peft_use_dora=true", "lora_dropout=0.0"),
    "schedule and 8-bit optimizer": ("max_steps=8", "lr_scheduler=cosine", "optimizer=adamw_bnb_8bit"),
}
KINDS = {
    "PiSSA, LoRA+, one cycle": (
        *("max_steps=6", "peft_init_lora_weights=pissa_niter_4", "fastlora=true", "bf16=true"),
        *("loraplus_lr_ratio=4", "lr_scheduler=one_cycle"),
    ),
    "OLoRA": ("max_steps=6", "peft_init_lora_weights=olora"),
    "ReLoRA": (
        *("max_steps=7", "relora_steps=2", "jagged_restart_warmup_steps=1", "fastlora=true"),
        *("lr_scheduler=cosine", "learning_rate=1e-3"),
    ),
}
EVERYWHERE = {"in the middle": 2, "at the end of an epoch": 3}


@pytest.mark.parametrize(
    ("case", "step"),
    [pytest.param(case, step, id=f"{case}, {at}") for case in CASES for at, step in EVERYWHERE.items()]
    + [pytest.param(case, 3, id=case) for case in KINDS],
)
def test_ends_as_if_it_had_not_been_stopped(config, tmp_path, monkeypatch, case, step):
    settings = [part for key in (CASES | KINDS)[case] for part in ("--set", key)]
    run(config, *settings)
    with monkeypatch.context() as stopping:
        stop_at(stopping, step)
        stopped = invoke(config, *settings, "--output-dir", f"{tmp_path}/again")
    assert stopped.exit_code == 130 and f"stopped after step {step}" in stopped.stderr
    assert [c.name for c in checkpoints(tmp_path / "again")] == [f"checkpoint-{step}"]
    output = run(config, *settings, "--output-dir", f"{tmp_path}/again", "--resume", "auto")
    assert f"going on from {tmp_path}/again/checkpoint-{step}" in output
    assert_same(tmp_path / "out", tmp_path / "again")


def test_a_signal_saves_and_training_goes_on(config, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2, signal.SIGUSR1)
    run(config, "--max-steps", "3")
    assert [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_what_has_changed_is_named(config, tmp_path, monkeypatch, write_jsonl, alpaca_rows):
    with monkeypatch.context() as stopping:
        stop_at(stopping, 2)
        invoke(config)
    data = write_jsonl(alpaca_rows)
    data.write_text(data.read_text().replace("loud", "low", 1))
    changed = invoke(config, "--resume", "auto", "--learning-rate", "0.02")
    assert changed.exit_code == 2
    assert "learning_rate was 0.01 and is 0.02; datasets[0] has other content" in changed.stderr
    output = run(config, "--resume", "auto", "--resume-anyway", "--learning-rate", "0.02")
    assert "checkpoint-2; learning_rate was 0.01 and is 0.02" in output
    resumed = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][3]
    assert resumed["event"] == "resume" and resumed["step"] == 2 and len(resumed["changed"]) == 2


def test_nothing_is_overwritten(config, tmp_path, monkeypatch):
    run(config, "--save-strategy", "steps", "--save-steps", "2")
    again = invoke(config)
    assert again.exit_code == 2 and "go on with it (--resume auto)" in again.stderr
    earlier = invoke(config, "--resume", str(tmp_path / "out" / "checkpoint-2"))
    assert earlier.exit_code == 2 and "checkpoint-2 is followed by checkpoint-6" in earlier.stderr
    missing = invoke(config, "--resume", "nowhere")
    assert missing.exit_code == 2 and "nowhere is no checkpoint" in missing.stderr
    assert "out holds checkpoint-2, checkpoint-4, checkpoint-6" in missing.stderr
    fork = ("--output-dir", f"{tmp_path}/fork", "--resume", str(tmp_path / "out" / "checkpoint-2"))
    run(config, *fork)
    assert_same_end = weights(tmp_path / "fork")
    assert all(t.equal(assert_same_end[name]) for name, t in weights(tmp_path / "out").items())


def test_auto_begins_where_nothing_was_saved(config, tmp_path):
    run(config, "--resume", "auto", "--max-steps", "1")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    run(config, "--resume", "auto", "--max-steps", "1")
    assert [x["event"] for x in map(json.loads, (tmp_path / "out" / "log.jsonl").open())] == [
        *("start", "train", "eval", "end"),
    ]


def test_a_full_disk_leaves_the_checkpoint_before(config, tmp_path, monkeypatch):
    """The limit on a file's size stands in for the disk's: half of the file of the weights is written."""
    run(config, "--max-steps", "1", "--set", "save_strategy=steps", "--set", "save_steps=1")
    size = (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, at: int) -> None:
        if at == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))

    monkeypatch.setattr(job.Progress, "stepped", full)
    try:
        result = invoke(
            config, "--output-dir", f"{tmp_path}/b", "--set", "save_strategy=steps", "--set", "save_steps=1"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.exit_code == 1
    assert "checkpoint-2 could not be written" in result.stderr and "checkpoint-1 is whole" in result.stderr
    assert [c.name for c in (tmp_path / "b").glob("*checkpoint*")] == ["checkpoint-1"]
    monkeypatch.undo()
    run(config, "--output-dir", f"{tmp_path}/b", "--resume", "auto", "--set", "save_strategy=steps",
        "--set", "save_steps=1")  # fmt: skip


def test_old_checkpoints_go_and_the_best_stays(config, tmp_path):
    run(config, "--set", "save_strategy=steps", "--set", "save_steps=1", "--save-total-limit", "2")
    assert [c.name for c in checkpoints(tmp_path / "out")] == ["checkpoint-5", "checkpoint-6"]
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", ".checkpoint-7.unfinished", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    clean(tmp_path / "run")
    rotate(tmp_path / "run", 2, best=tmp_path / "run" / "checkpoint-9")
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-100", "checkpoint-9", "other"]


def test_a_run_killed_behind_its_last_step_takes_no_other(config, tmp_path):
    settings = ("--set", "save_strategy=steps", "--set", "save_steps=5", "--max-steps", "5")
    run(config, *settings)
    before = weights(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    run(config, *settings, "--resume", "auto")
    assert all(tensor.equal(before[name]) for name, tensor in weights(tmp_path / "out").items())
    assert [line["step"] for line in curve(tmp_path / "out") if line["event"] == "train"] == [1, 2, 3, 4, 5]


def test_the_best_is_kept_and_becomes_the_result(config, tmp_path):
    """Steps that become so long that the held-out loss goes up again, on any processor."""
    settings = [
        "log_sweep_max_lr=3",
        "save_strategy=steps",
        "save_steps=1",
        "save_total_limit=1",
        "eval_steps=1",
    ]
    sweep = ("lr_scheduler=log_sweep", "log_sweep_min_lr=1e-3")
    given = [part for key in (*settings, *sweep, "load_best_model_at_end=true") for part in ("--set", key)]
    output = run(config, *given)
    found = {line["step"]: line["eval_loss"] for line in curve(tmp_path / "out") if line["event"] == "eval"}
    best = min(found, key=found.__getitem__)
    assert best < 6 and f"that of checkpoint-{best}" in output
    assert [c.name for c in checkpoints(tmp_path / "out")] == [f"checkpoint-{best}", "checkpoint-6"]
    result, last = weights(tmp_path / "out"), weights(tmp_path / "out" / "checkpoint-6")
    assert all(t.equal(result[name]) for name, t in weights(tmp_path / "out" / f"checkpoint-{best}").items())
    assert any(not t.equal(result[name]) for name, t in last.items())
    again = tmp_path / "again"
    run(
        config,
        *given[:6],
        *given[8:14],
        "--save-strategy",
        "best",
        "--output-dir",
        str(again),
        "--save-steps",
        "",
    )
    assert checkpoints(again)[-1].name == f"checkpoint-{best}"
