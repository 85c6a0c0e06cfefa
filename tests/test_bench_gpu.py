"""bench.gpu without a GPU: the plan, children that fail, layers, the stopwatch, and a rehearsal."""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import _gpu_layers, _stopwatch, gpu  # noqa: E402
from bench._gpu_run import Run, stream  # noqa: E402
from bench._results import Results  # noqa: E402
from bench._stream import Lines, plain, run_child  # noqa: E402

# ---- the plan ---------------------------------------------------------------------------------------------


def test_what_matters_most_is_measured_first():
    cases = _gpu_layers.cases()
    assert [str(case) for case in cases[:4]] == [
        "8B linears, bf16 LoRA, T = 8192",
        "8B linears, bf16 LoRA, T = 512",
        "8B linears, NF4 LoRA, T = 8192",
        "8B linears, NF4 LoRA, T = 512",
    ]
    assert len(set(cases)) == len(cases)
    whole = itertools.product(
        ("1B", "8B", "70B"), ("bf16", "NF4"), ("LoRA", "dropout", "DoRA"), (512, 2048, 8192)
    )
    linears = {(c.model, c.storage, c.feature, c.tokens) for c in cases if c.level == "linears"}
    assert linears == set(whole)
    first_of_another_model = next(at for at, case in enumerate(cases) if case.model != "8B")
    assert all(case.model == "8B" for case in cases[:first_of_another_model])
    assert {case.level for case in cases[:first_of_another_model]} >= {"linears", "block", "compiled"}


def test_a_step_has_its_share_and_what_was_left_before_it():
    steps = [gpu.Step(name, seconds, None) for name, seconds in (("a", 10), ("b", 30), ("c", 60))]
    assert gpu.time_for(0, steps, 200, 200) == pytest.approx(20)
    assert gpu.time_for(1, steps, 195, 200) == pytest.approx(75)  # a took 5 of its 20
    assert gpu.time_for(2, steps, 20, 200) == pytest.approx(20)  # a and b took more than theirs
    assert sum(step.seconds for step in gpu.STEPS) <= 60 * gpu.MINUTES


def test_a_wheel_that_does_not_install_stops_no_other(tmp_path, monkeypatch):
    """And the checkout comes first: with it Triton's kernels have their place."""
    for name in ("accelerate-1.0-py3-none-any", "bitsandbytes-0.5-py3-none-any", "peft-0.2-py3-none-any"):
        (tmp_path / f"{name}.whl").touch()
    asked = []

    def pip(command, env, log, until):
        asked.append(command[-1])
        log.write_text("no matching distribution\n")
        return int(command[-1] == "bitsandbytes")

    def nothing_is_installed(name):
        raise gpu.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpu, "run_child", pip)
    monkeypatch.setattr(gpu.importlib.metadata, "distribution", nothing_is_installed)
    outcome = gpu.install(Run(tmp_path / "out", tmp_path, True, tmp_path), time.time() + 60)
    assert asked == [str(ROOT), "accelerate", "bitsandbytes", "peft"]
    assert outcome.status == "failed" and outcome.said.startswith("3 installed; bitsandbytes: ")


def test_steps_fail_alone(tmp_path, capsys):
    def breaks(run, until):
        raise RuntimeError("a broken step in /some/folder/of/mine.py")

    run = Run(tmp_path / "out", tmp_path, True, None)
    steps = [
        gpu.Step("slow", 50, lambda run, until: gpu.Outcome("done", "late")),
        gpu.Step("breaks", 50, breaks),
        gpu.Step("after", 50, lambda run, until: gpu.Outcome("done", "well")),
    ]
    assert not gpu.run_steps(run, steps, 150)
    rows = Results.read(run.path).rows
    assert [(row["step"], row["outcome"]) for row in rows] == [
        ("slow", "done"),
        ("breaks", "failed"),
        ("after", "done"),
    ]
    assert rows[1]["said"] == "RuntimeError: a broken step in mine.py"
    run.began -= 1000
    assert gpu.run_steps(run, steps[:1], 150)
    assert run.results.rows[-1]["said"] == "no time was left"


def test_a_later_run_keeps_the_other_steps_of_the_same_commit(tmp_path):
    run = Run(tmp_path, tmp_path, True, None)
    run.results.environment["commit"] = "abc"
    for step in ("tests", "layers"):
        run.add(step, {"outcome": "done", "said": "", "seconds": 1})
    run.write()
    for commit, kept in (("abc", ["tests"]), ("def", [])):
        again = Run(tmp_path, tmp_path, True, None)
        again.results.environment["commit"] = commit
        again.keep_earlier(["layers"])
        assert [row["step"] for row in again.results.rows] == kept


# ---- children ---------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def say(**line):
    with open(arguments["--stream"], "a") as file:
        file.write(json.dumps(line) + "\\n")
for at in range(int(arguments["--skip"]), 5):
    say(at=at, case=f"case {at}")
    if at == 1:
        say(at=at, failed="ValueError: no")
        continue
    if at == 2:
        print("illegal memory access in /a/folder/kernel.cu")
        os._exit(86)
    if at == 4:
        time.sleep(600)
    say(at=at, row={"question": "q", "case": str(at), "value": 1.0, "unit": "x", "assumed": None})
"""


def test_a_child_that_ends_costs_its_case_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench._stream.GRACE", 0.0)
    (tmp_path / "dying_child.py").write_text(CHILD)
    run = Run(tmp_path / "out", tmp_path, True, None)
    run.env["PYTHONPATH"] = str(tmp_path)
    outcome = stream(run, "machine", ["dying_child"], time.time() + 2)
    rows = Results.read(run.path).rows
    assert [row["case"] for row in rows if "question" in row] == ["0", "3"]
    assert [(row["case"], row["failed"]) for row in rows if "failed" in row] == [
        ("case 1", "ValueError: no"),
        ("case 2", "its process ended: illegal memory access in kernel.cu"),
        ("case 4", "its process ended: out of time"),
    ]
    assert outcome.status == "failed" and outcome.said.startswith(
        "2 rows; 3 failed: case 1: ValueError: no; case 2"
    )


def test_children_of_a_child_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bench._stream.GRACE", 0.0)
    log = tmp_path / "log"
    code = "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    seen = []

    def watch():
        seen.append(log.read_text())

    assert run_child([sys.executable, "-c", code], {}, log, time.time() + 1, watch) is None
    pid = int(seen[-1])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline


def test_a_run_that_is_ended_ends_its_children_and_keeps_what_it_has(tmp_path):
    """A kill of the one process that a job scheduler knows, in the middle of a step."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--only", "machine", "--out", str(out)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "empty launch" in line:
            break
    (child,) = psutil.Process(run.pid).children()
    run.terminate()
    assert run.wait(60) == 143
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert any(row.get("question") == "empty launch" for row in Results.read(out / "gpu.json").rows)


def test_lines_are_read_once_and_whole(tmp_path):
    path = tmp_path / "lines"
    lines = Lines(path)
    assert lines.fresh() == []
    path.write_text('{"a": 1}\n{"b"')
    assert lines.fresh() == [{"a": 1}]
    with path.open("a") as file:
        file.write(': "ä"}\n{"c": 3}\n')
    assert lines.fresh() == [{"b": "ä"}, {"c": 3}]
    assert lines.fresh() == []


def test_no_folder_of_this_machine_is_named():
    assert (
        plain("error in /home/me/x-1.2/a.cu:3 and ./b/c.py, 3 / 4, a/b")
        == "error in a.cu:3 and ./b/c.py, 3 / 4, a/b"
    )


# ---- layers -----------------------------------------------------------------------------------------------


def test_without_bitsandbytes_ours_is_measured_on_4_bits_alone(monkeypatch):
    there = importlib.util.find_spec
    without = lambda name, *_: None if name == "bitsandbytes" else there(name, *_)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(_gpu_layers, "SECONDS", 0.0)
    _gpu_layers.adapted.cache_clear()
    for feature in ("LoRA", "DoRA"):
        case = _gpu_layers.Case("linears", "tiny", "NF4", feature, 8)
        (row,) = _gpu_layers.measure(case, torch.device("cpu"))
        assert set(row["ms"]) == {"base", "ours fp32+ac", "ours bf16"}
        assert row["left_out"] == {"PEFT": "bitsandbytes is not installed"}
        assert row["saved_bytes"]["base"] == 0 < row["saved_bytes"]["ours bf16"]
    _gpu_layers.adapted.cache_clear()


def test_other_projects_functions_get_pefts_layers(monkeypatch):
    """As Axolotl's and Unsloth's take them; a function that breaks is left out with its reason."""
    rival = SimpleNamespace(
        apply_lora_qkv=lambda self, x: (self.q_proj(x), self.k_proj(x), self.v_proj(x)),
        apply_lora_o=lambda self, x: self.o_proj(x),
        apply_lora_mlp_swiglu=lambda self, x: self.down_proj(
            self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        ),
    )
    monkeypatch.setitem(sys.modules, "rival", rival)
    monkeypatch.setitem(sys.modules, "broken", SimpleNamespace(apply_lora_qkv=lambda self, x: self.missing))
    monkeypatch.setattr(_gpu_layers, "RIVALS", {"Rival": "rival", "Broken": "broken"})
    monkeypatch.setattr(_gpu_layers, "SECONDS", 0.0)
    _gpu_layers.adapted.cache_clear()
    (row,) = _gpu_layers.measure(_gpu_layers.Case("rivals", "tiny", "bf16", "LoRA", 8), torch.device("cpu"))
    assert {"Rival", "PEFT fp32+ac", "ours fp32+ac"} <= set(row["tax"])
    assert row["saved_bytes"]["Rival"] == row["saved_bytes"]["PEFT fp32+ac"]
    assert row["left_out"]["Broken"].startswith("AttributeError: ")


def test_saved_bytes_leave_weights_out():
    pytest.importorskip("bitsandbytes")
    _gpu_layers.adapted.cache_clear()
    shape, device = _gpu_layers.TINY["tiny"], torch.device("cpu")
    case = _gpu_layers.Case("block", "tiny", "NF4", "LoRA", 64)
    given = _gpu_layers.Given.of(case, shape, device)
    models = _gpu_layers.adapted(shape, device, "NF4", _gpu_layers.FEATURES["LoRA"])
    kept = {name: _gpu_layers.Step(model, given, False).saved_bytes() for name, model in models.items()}
    taken = sum(x.nbytes for x in given.inputs)
    mlp = 2 * 64 * shape.intermediate * 2  # gate and up
    ranks = 7 * 64 * 16 * 4  # S of every linear
    assert kept["ours bf16"] == taken + mlp + ranks
    assert kept["PEFT bf16"] > kept["ours bf16"] - ranks


# ---- the stopwatch ----------------------------------------------------------------------------------------


def test_the_gpu_waits_for_the_host(monkeypatch):
    """On a GPU that is played: a call's time begins when the GPU does, which is after the host is done."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0

    class Chip:
        L2_cache_size = 1 << 20

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: Chip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    watch = _stopwatch.CudaStopwatch()

    def run():
        time.sleep(0.01)

    assert [watch.busy(run), watch.cold(run)] == [0.003, 0.003]
    assert slept[0] == 0 and slept[1] >= 2 * 0.01 * _stopwatch.CYCLES
    assert watch.wall(run) >= 0.01 and watch.host(run) >= 0.01


# ---- the program ------------------------------------------------------------------------------------------


def test_wrong_options_and_a_missing_gpu_are_explained(tmp_path):
    done = CliRunner().invoke(gpu.main, ["--only", "layer"])
    assert done.exit_code == 2 and "'layer': choose from install, build, tests, machine" in " ".join(
        done.output.split()
    )
    if not torch.cuda.is_available():
        done = CliRunner().invoke(gpu.main, [])
        assert done.exit_code == 1 and "no GPU: torch" in done.output
    out = tmp_path / "out"
    done = CliRunner().invoke(
        gpu.main, ["--rehearse", "--only", "install", "--wheels", str(tmp_path), "--out", str(out)]
    )
    assert done.exit_code == 1 and "no wheels in" in done.output
    assert Results.read(out / "gpu.json").rows[0]["outcome"] == "failed"


def test_a_rehearsal_goes_all_the_way(tmp_path):
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Results.read(tmp_path / "gpu.json")
    outcomes = {row["step"]: row["outcome"] for row in found.rows if "outcome" in row}
    assert outcomes == {step.name: "done" for step in gpu.STEPS} | {
        "install": "skipped",
        "sanitizer": "skipped",
    }
    (tests,) = [row for row in found.rows if row["step"] == "tests" and "passed" in row]
    assert tests["passed"] >= 8 and not tests["failed"]
    rows = [row for row in found.rows if "tax" in row]
    assert [(row["level"], row["storage"], row["feature"]) for row in rows] == [
        (case.level, case.storage, case.feature) for case in _gpu_layers.tiny_cases()
    ]
    for row in rows:
        assert row["fallback"] == "" and row["difference"]
        assert all(0 < value < 0.05 for value in row["difference"].values())
        assert {"base", "PEFT fp32+ac", "ours fp32+ac"} <= set(row["ms"])
    assert {"PEFT compiled", "ours compiled"} <= set(rows[3]["tax"])
    assert set(rows[4]["left_out"]) | set(rows[4]["tax"]) >= {"Axolotl", "Unsloth"}
    asked = {row["question"] for row in found.rows if "question" in row}
    assert len(asked) == 10 and {row["variant"] for row in found.rows if "op" in row} >= {"cpu", "torch"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "gpu.json",
        "gpu_ops.png",
        "gpu_tax.png",
    ]
    text = json.dumps(found.rows) + (tmp_path / "README.md").read_text()
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
