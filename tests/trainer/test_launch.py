"""`fastlora train --nproc 2` as a user starts it: what becomes of a process that dies, and of signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from pyfastlora.trainer.checkpoints import checkpoints, step_of

START = "from pyfastlora.cli.main import main; main()"
SECONDS = 150


@contextmanager
def started(config: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", START, "train", str(config), "--nproc", "2", *arguments]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    ends = time.monotonic() + SECONDS
    while not until():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.02)


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process {rank}")


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    held_out = write_jsonl(alpaca_rows[:5], "held_out.jsonl")
    return config_file(
        write_jsonl(alpaca_rows),
        f"test_datasets:\n  - path: {held_out}\n    type: alpaca\neval_steps: 3\npeft_use_dora: true\n"
        "sample_packing: true\ngradient_checkpointing: true\nlora_dropout: 0.1\n",
    )


SETTINGS = (
    *("--adapter", "qlora", "--micro-batch-size", "1", "--sequence-len", "128", "--max-steps", "40"),
    *("--save-strategy", "steps", "--save-steps", "2"),
)


def test_killed_started_again_stopped_and_gone_on_with(config, tmp_path):
    """The end is that of a run nobody touched."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    with started(config, *SETTINGS, "--max-restarts", "1") as process:
        wait(process, lambda: bool(checkpoints(out)))
        worker(process, 1).send_signal(signal.SIGKILL)
        reached = step_of(checkpoints(out)[-1])
        assert reached < 40
        # the agent starts both again, which go on from the newest checkpoint
        wait(process, lambda: '"resume"' in (out / "log.jsonl").read_text())
        again = step_of(checkpoints(out)[-1])
        wait(process, lambda: step_of(checkpoints(out)[-1]) > again)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 130, errors
        assert errors.count("Error: stopped after step") == 1 and "Traceback" not in errors
    stopped = step_of(checkpoints(out)[-1])
    assert reached <= stopped < 40
    for arguments in (("--resume", "auto"), ("--output-dir", f"{tmp_path}/whole")):
        with started(config, *SETTINGS, *arguments) as process:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    one, other = (load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "whole"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    assert all(tensor.abs().sum() > 0 for name, tensor in one.items())
    lines = [list(map(json.loads, (f / "log.jsonl").open())) for f in (out, tmp_path / "whole")]
    for key in ("loss", "eval_loss"):
        first, second = ([(x["step"], x[key]) for x in found if key in x] for found in lines)
        assert first == second and len(first) >= 13


def test_the_process_that_dies_is_named_and_the_others_end(config, tmp_path):
    with started(config, "--max-steps", "5000", "--save-strategy", "steps", "--save-steps", "2") as process:
        wait(process, lambda: bool(checkpoints(tmp_path / "out")))
        others = psutil.Process(process.pid).children()
        worker(process, 1).send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("Error: process 1 was ended by SIGKILL")
    assert "Traceback" not in errors and not any(p.is_running() for p in others)


def test_nobody_trains_on_without_the_launcher(config, tmp_path):
    """kill -9 of it alone: the processes save and end, and the folder is free for a run that goes on."""
    out = tmp_path / "out"
    with started(config, "--max-steps", "5000", "--save-strategy", "steps", "--save-steps", "2") as process:
        wait(process, lambda: bool(checkpoints(out)))
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.kill()
        gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2 and not alive
    assert step_of(checkpoints(out)[-1]) < 5000 and not list(out.glob(".*"))


def test_a_mistake_is_told_once(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with started(config) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert errors.count("Error:") == 1 and "is not empty (it holds mine.txt)" in errors


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node=2", "-m"),
    # accelerate's way of several processes on a CPU is mpirun; this is its way on GPUs, without them
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "-m"),
    ),
    "deepspeed": ("deepspeed.launcher.runner", "--num_gpus=2", "--module"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_joins_what_others_start(write_jsonl, alpaca_rows, config_file, tmp_path, launcher):
    pytest.importorskip("deepspeed")
    config = config_file(write_jsonl(alpaca_rows))
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "pyfastlora.cli.main", "train", str(config)]
    port = {"MASTER_PORT": str(29600 + os.getpid() % 300)}
    done = subprocess.run(
        [*command, "--max-steps", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])} | port,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 steps, ") == 1  # one of them speaks
    assert json.loads((tmp_path / "out" / "strategy.json").read_text())["processes"] == 2
