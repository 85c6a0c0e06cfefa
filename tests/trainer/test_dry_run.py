"""`fastlora train --dry-run`, memory that does not suffice, and hints for errors of other libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pyfastlora.cli.train import train
from pyfastlora.trainer import dry_run, memory_plan
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.hints import HINTS, hint
from pyfastlora.trainer.out_of_memory import (
    NotEnoughMemoryError,
    out_of_memory_explained,
    wanted_and_free,
)
from pyfastlora.trainer.packing import PackedRows
from pyfastlora.trainer.processes import Processes

GPU_FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 512.00 "
    "MiB is free. Including non-PyTorch memory, this process has 78.60 GiB memory in use."
)
CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 3145728 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    return config_file(write_jsonl(alpaca_rows), "val_set_size: 4\n")


def run(config: Path, *arguments: str) -> Any:
    return CliRunner().invoke(train, [str(config), *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    "overrides",
    [["--sample_packing=true"], ["--adapter=", "--lora_target_linear=", "--lora_r=8", "--lora_alpha=8"]],
    ids=["packed", "whole model"],
)
def test_a_dry_run_reports_and_leaves_nothing(config, tmp_path, monkeypatch, overrides):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = {p for p in tmp_path.rglob("*") if "prepared_data" not in p.parts}
    result = run(config, "--dry-run", "--gradient-accumulation-steps", "2", "--eval-steps", "1", *overrides)
    assert result.exit_code == 0, result.output
    for told in ("one step of ", "held-out loss ", "planned", "saved and read back: ", "out is as it was"):
        assert told in result.stdout
    assert ("of 14 LoRA modules fused" in result.stdout) == (overrides[0] == "--sample_packing=true")
    assert {p for p in tmp_path.rglob("*") if "prepared_data" not in p.parts} == before
    numbers = re.search(r"memory: ([\d.]+) MiB at most, ([\d.]+) MiB planned", result.stdout)
    assert float(numbers[1]) == pytest.approx(float(numbers[2]), rel=0.15)


def test_the_longest_samples_and_the_fullest_rows():
    import datasets

    lengths = [3, 9, 5, 9, 7, 2]
    samples = [{"input_ids": [1] * n, "labels": [1] * n, "length": n} for n in lengths]
    data = datasets.Dataset.from_list(samples)
    assert dry_run._longest(data, 3)["length"] == [9, 9, 7]

    class Config:
        sequence_len, sample_packing_bin_size = 12, None

    rows = PackedRows.of(data, Config, 0)
    tokens = sorted((sum(len(s["input_ids"]) for s in rows[i]) for i in range(len(rows))), reverse=True)
    chosen = dry_run._longest(rows, 2)
    assert [sum(len(s["input_ids"]) for s in chosen[i]) for i in range(2)] == tokens[:2]


def test_a_saved_adapter_that_is_not_whole(config, tmp_path):
    assert run(config, "--fastlora", "false", "--max-steps", "1").exit_code == 0
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out/adapter_model.safetensors"
    loaded, weights = load_config(config).config, load_file(file)
    assert dry_run.check_saved(loaded, file.parent) == file.stat().st_size
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, file)
    with pytest.raises(Exception, match=f"lacks 1 weights, such as {re.escape(name)}"):
        dry_run.check_saved(loaded, file.parent)
    save_file(weights | {name: weights[name] * float("nan")}, file)
    with pytest.raises(Exception, match=f"after one step {re.escape(name)} has values that are not finite"):
        dry_run.check_saved(loaded, file.parent)


def failing(monkeypatch: pytest.MonkeyPatch, where: str, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(where, fail)


@pytest.mark.parametrize(
    ("where", "error", "phase"),
    [
        ("transformers.LlamaForCausalLM.from_pretrained", RuntimeError(CPU_FULL), "loading weights: 3.0 MiB"),
        ("transformers.LlamaForCausalLM.forward", torch.OutOfMemoryError(GPU_FULL), "forward: 2.50 GiB were"),
        ("torch.autograd._engine_run_backward", RuntimeError(CPU_FULL), "backward: 3.0 MiB were wanted"),
        ("torch.optim.AdamW._init_group", MemoryError(), "the optimizer step\n"),
        ("peft.PeftModel.save_pretrained", RuntimeError(CPU_FULL), "saving: 3.0 MiB were wanted"),
    ],
)
def test_out_of_memory_says_where_and_what_would_fit(config, monkeypatch, where, error, phase):
    monkeypatch.setattr(memory_plan, "LIBRARIES", {"cpu": 0})
    failing(monkeypatch, where, error)
    if "forward" in where:  # that of the model that finds out what is planned must not fail
        rehearsed = "pyfastlora.trainer.rehearsal.Rehearsal._loss"
        monkeypatch.setattr(rehearsed, lambda self, batch: torch.zeros((), requires_grad=True))
    result = run(config, "--fastlora", "false", "--max-steps", "1")
    assert result.exit_code == 1
    assert f"Error: out of memory in {phase}" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_advice_saves_what_was_missing(config, monkeypatch):
    """3 MiB were missing: of what is planned without them, micro_batch_size and accumulation are traded."""
    monkeypatch.setattr(memory_plan, "LIBRARIES", {"cpu": 0})
    loaded = load_config(config).config
    with pytest.raises(NotEnoughMemoryError) as caught, out_of_memory_explained(loaded, Processes()):
        raise RuntimeError(CPU_FULL)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("out of memory in training: 3.0 MiB were wanted") and "planned are" in lines[1]
    assert len(lines) > 2 and all(line.startswith("it fits with ") for line in lines[2:])
    found = [dict(re.findall(r"(\w+): (\w+)", line)) for line in lines[2:]]
    assert all(
        int(f["micro_batch_size"]) * int(f["gradient_accumulation_steps"]) == loaded.micro_batch_size
        for f in found
        if "micro_batch_size" in f
    )
    assert any("micro_batch_size" in f for f in found)


def test_other_errors_pass(config):
    explained = out_of_memory_explained(load_config(config).config, Processes())
    with pytest.raises(RuntimeError, match="mat1"), explained:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_numbers_of_torchs_messages():
    assert wanted_and_free(RuntimeError(GPU_FULL)) == (round(2.5 * 2**30), 512 * 2**20)
    assert wanted_and_free(RuntimeError(CPU_FULL)) == (3 * 2**20, None)
    assert wanted_and_free(MemoryError()) == (None, None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("exitcode  : -9 (pid: 4242)"), "for want of RAM"),
        (RuntimeError("expected scalar type Float but found Half"), "fp16: true"),
        (RuntimeError("mat1 and mat2 must have the same dtype, but got Float and BFloat16"), "bf16: true"),
        (NotImplementedError("No operator found for `memory_efficient_attention_forward`"), "sdpa"),
        (ValueError("Please run `accelerate config` first"), "nothing to do"),
        (RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL"), "ddp_timeout"),
        (RuntimeError("stack expects each tensor to be equal size, but"), "sample_packing: false"),
        (RuntimeError("CUDA error: device-side assert triggered"), "token id beyond the embeddings"),
        (IndexError("index out of range in self"), "token id beyond the embeddings"),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "update the driver"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "fastlora build"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "fastlora plan"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error"), "num_workers: 0"),
        (RuntimeError("tensors does not require grad and does not have a grad_fn"), "use_reentrant"),
        (OSError("401 Client Error: Unauthorized for url"), "hf auth login"),
        (OSError(98, "Address already in use"), "the port is taken"),
        (UserWarning("The current process just got forked, after parallelism has"), "no error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_error_has_its_hint(error, words):
    found = hint(error)
    assert found is not None and words in found
    wrapped = RuntimeError("training failed")
    wrapped.__cause__ = error
    assert hint(wrapped) == found


def test_hints_are_for_errors_that_are_known():
    assert hint(RuntimeError("something else")) is None and hint(KeyError("text")) is None
    assert len({h.sentence for h in HINTS}) == len(HINTS)
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    assert not [h.sentence for h in HINTS if h.sentence not in page]


def test_an_unexpected_error_keeps_its_traceback_and_ends_with_the_hint(config, monkeypatch):
    failing(monkeypatch, "pyfastlora.trainer.job.run", IndexError("index out of range in self"))
    result = CliRunner().invoke(train, [str(config)])
    assert isinstance(result.exception, IndexError)
    assert result.exception.__notes__ == [f"hint: {hint(result.exception)}"]


def test_the_run_has_its_plan_beside_what_it_took(config, tmp_path):
    assert run(config, "--max-steps", "2").exit_code == 0
    found = json.loads((tmp_path / "out/plan.json").read_text())
    assert found["measured_bytes"] == pytest.approx(found["planned"]["total_bytes"], rel=0.15)
