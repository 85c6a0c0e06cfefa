"""One record per logging step: what is in it, and that every place shows the same numbers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyfastlora.trainer import job, record
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.run_dir import RunDir

FIELDS = {
    *("event", "time", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens"),
    *("seconds", "tokens_per_second", "trained_tokens_per_second", "memory_bytes", "memory_peak_bytes"),
    *("eta_seconds", "last_eval_loss"),
}


def train(config: Path, console: Console) -> list[dict]:
    """Five records, with an evaluation before the first and behind the third."""
    result = job.train(load_config(config, ["max_steps=5", "fastlora=false"]), console)
    return result.run_dir.read_log("train")


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    extra = "val_set_size: 4\neval_on_start: true\neval_strategy: steps\neval_steps: 3\n"
    return config_file(write_jsonl(alpaca_rows), extra)


def numbers(text: str) -> dict[str, str]:
    """What stands behind each name, of a line or of a frame."""
    names = ("loss", "lr", "grad norm", "tokens/s", "trained tokens/s", "held-out loss", "left")
    found = {n: re.search(rf"(?<![\w-] )(?<![\w-]){re.escape(n)} +([\w.:+-]+)", text) for n in names}
    memory = re.search(r"memory +([\d.]+) (.iB) \(peak ([\d.]+) (.iB)\)", text)
    assert memory and all(found.values()), text
    return {n: m[1] for n, m in found.items() if m} | {"memory": memory[1] + memory[2], "peak": memory[3]}


def assert_shows(text: str, line: dict) -> None:
    """The numbers of a text are those of a line of log.jsonl, rounded."""
    told = numbers(text)
    unit = {"MiB": 2**20, "GiB": 2**30}[told["memory"][-3:]]
    assert float(told["memory"][:-3]) == pytest.approx(line["memory_bytes"] / unit, abs=0.051)
    assert float(told["peak"]) == pytest.approx(line["memory_peak_bytes"] / unit, abs=0.051)
    for name, key, places in (
        ("loss", "loss", 5e-5),
        ("lr", "learning_rate", 1e-8),
        ("grad norm", "grad_norm", 5e-3 * line["grad_norm"]),
        ("tokens/s", "tokens_per_second", 0.51),
        ("trained tokens/s", "trained_tokens_per_second", 0.51),
        ("held-out loss", "last_eval_loss", 5e-5),
    ):
        assert float(told[name]) == pytest.approx(line[key], abs=places), name
    hours, minutes, seconds = map(int, told["left"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(line["eta_seconds"], abs=0.5)


def test_lines_show_the_records_of_the_log(config):
    out = io.StringIO()
    lines = train(config, Console(out))
    evaluated = RunDir(config.parent / "out").read_log("eval")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line.keys() == FIELDS for line in lines)
    first, second = evaluated[0]["eval_loss"], evaluated[1]["eval_loss"]
    assert [line["last_eval_loss"] for line in lines] == [first, first, first, second, second]
    assert first != second and lines[-1]["eta_seconds"] == 0
    told = [line for line in out.getvalue().splitlines() if re.match(r"step \d/5: loss", line)]
    assert len(told) == 5
    for text, line in zip(told, lines, strict=True):
        assert_shows(text, line)
        assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"]
        rate = line["trained_tokens"] / line["tokens"]
        assert line["trained_tokens_per_second"] / line["tokens_per_second"] == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize("width", [120, 60])
def test_a_terminal_shows_the_records_of_the_log(config, width):
    out = io.StringIO()
    lines = train(config, Console(out, terminal=True, width=width))
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue())
    assert not re.search(r"step \d/5: loss", text)
    frames = {}
    for frame in re.split("╭", text)[1:]:
        if step := re.search(r"step +(\d)/5", frame):
            frames[int(step[1])] = frame.partition("╯")[0]
    assert sorted(frames) == [1, 2, 3, 4, 5]
    for line in lines:
        assert_shows(frames[line["step"]], line)
    assert re.search(r"training .* 5/5 steps", text)
    assert all(len(row) <= width for frame in frames.values() for row in frame.splitlines())


def test_the_other_processes_show_nothing(config):
    out = io.StringIO()
    console = Console(out, quiet=True, terminal=True)
    with console.live() as view:
        assert view is None
    assert not out.getvalue()


def test_the_clock_leaves_evaluations_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    recorder = record.Recorder(torch.device("cpu"))
    recorder.start(10)  # a run that goes on
    state = SimpleNamespace(global_step=10, max_steps=20, log_history=[{"eval_loss": 3.0}, {"loss": 1.0}])
    now[0] += 50
    recorder.evaluated(10, 50.0)  # before the first step: says nothing of the steps
    state.global_step, now[0] = 12, now[0] + 4
    made = recorder.record(state, 400, 100)
    assert made["tokens_per_second"] == 100.0 and made["trained_tokens_per_second"] == 25.0
    assert made["seconds"] == 4.0 and made["eta_seconds"] == 2.0 * 8 and made["last_eval_loss"] == 3.0
    now[0] += 6
    recorder.evaluated(12, 6.0)
    state.global_step, now[0] = 14, now[0] + 2
    made = recorder.record(state, 400, 100)
    assert made["tokens_per_second"] == 200.0  # two seconds of training
    assert made["eta_seconds"] == (4 + 6 + 2) / 4 * 6  # evaluations to come take their time too
    state.log_history.clear()
    now[0] += 1
    assert "last_eval_loss" not in recorder.record(state, 1, 1)


def test_memory_is_that_of_the_process():
    before, _ = record_memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    now, peak = record_memory()
    assert now - before == pytest.approx(held.nbytes, rel=0.1) and peak >= now
    del held
    assert record_memory()[1] >= now - (4 << 20)  # the kernel counts in batches


def record_memory() -> tuple[int, int]:
    from pyfastlora.trainer.memory import memory_in_use

    return memory_in_use(torch.device("cpu"))


def test_a_record_is_json_with_a_loss_that_is_no_number(tmp_path):
    run_dir = RunDir(tmp_path)
    values = {"step": 1, "loss": float("nan"), "memory_bytes": 1, "memory_peak_bytes": 2, "eta_seconds": 0.0}
    run_dir.log("train", values)
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == "nan"
    assert record.shown(values)["loss"] == "nan"
