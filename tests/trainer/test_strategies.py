"""Two processes under every strategy: the losses of one process, exact resume, an adapter that merges.

All jobs run in one pair of processes, as a start takes longer than a job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pyfastlora.cli.train import train
from pyfastlora.trainer.config.load import load_config

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
QLORA = ("ddp", "fsdp2", "zero3")
SECONDS = 400
#: Of QLoRA with all that has a state of its own.
FEATURES = (
    *("adapter=qlora", "peft_use_dora=true", "lora_dropout=0.1", "sample_packing=true", "sequence_len=128"),
    *("gradient_checkpointing=true", "max_steps=8", "lr_scheduler=cosine", "logging_steps=3"),
    *("bnb_config_kwargs.bnb_4bit_quant_storage=float32", "bnb_config_kwargs.bnb_4bit_compute_dtype=float32"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of all jobs' output folders, and of what they ended with."""
    folder = tmp_path_factory.mktemp("strategies")
    rows = [
        {"instruction": f"greet {n % 3}", "input": "loud" * (n % 5), "output": "hello " * (1 + n % 4)}
        for n in range(43)
    ]
    for name, part in (("data", rows), ("held_out", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = folder / "cfg.yaml"
    config.write_text(
        f"base_model: {tiny_model}\ndatasets: [{{path: {folder}/data.jsonl, type: alpaca}}]\n"
        f"test_datasets: [{{path: {folder}/held_out.jsonl, type: alpaca}}]\n"
        "adapter: lora\nlora_target_linear: true\nlora_r: 8\nlora_alpha: 16\nsequence_len: 256\n"
        "micro_batch_size: 2\nlearning_rate: 1e-2\nbf16: false\nmax_steps: 10\nlr_scheduler: constant\n"
        f"save_strategy: steps\nsave_steps: 4\neval_steps: 5\ndataset_prepared_path: {folder}/prepared\n"
        "report_samples: 0\n"
    )
    jobs = []
    for kind, strategies, overrides in (("lora", STRATEGIES, ()), ("qlora", QLORA, FEATURES)):
        for strategy in strategies:
            given = [*overrides, f"strategy={strategy}"]
            whole = f"{kind} {strategy}"
            checkpoint = f"{folder}/out/{whole}/checkpoint-4"
            for name, resume in ((whole, "never"), (f"{whole} again", checkpoint)):
                to = [*given, f"output_dir={folder}/out/{name}"]
                jobs.append({"name": name, "config": str(config), "overrides": to, "resume": resume})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    here = Path(__file__).parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(here / "engine_worker.py"), str(folder / "jobs.json"), str(SECONDS)),
        ],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(here.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS + 60,
    )
    (folder / "log").write_text(done.stdout)
    return folder


def ended(runs: Path, name: str) -> Path:
    """The output folder of a job that went well."""
    for rank in (0, 1):
        file = runs / f"{name} {rank}"
        assert file.exists(), (runs / "log").read_text()[-6000:]
        assert file.read_text() == ""
    return runs / "out" / name


def logged(out: Path, key: str, event: str = "train") -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line[key] for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def alone(runs: Path) -> Path:
    """The same with one process and twice its samples."""
    arguments = [str(runs / "cfg.yaml"), "--micro-batch-size", "4", "--output-dir", f"{runs}/out/alone"]
    result = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return runs / "out" / "alone"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_process(runs, alone, strategy):
    pytest.importorskip("deepspeed")
    out = ended(runs, f"lora {strategy}")
    losses = logged(alone, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert logged(out, "loss") == pytest.approx(losses, rel=1e-5)
    assert logged(out, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    assert logged(out, "eval_loss", "eval") == pytest.approx(logged(alone, "eval_loss", "eval"), rel=1e-5)
    for key, event in (("tokens", "train"), ("trained_tokens", "train"), ("eval_tokens", "eval")):
        assert logged(out, key, event) == logged(alone, key, event)
    strategy_json = json.loads((out / "strategy.json").read_text())
    assert strategy_json["name"] == strategy and strategy_json["processes"] == 2


@pytest.mark.parametrize("job", [*(f"lora {s}" for s in STRATEGIES), *(f"qlora {s}" for s in QLORA)])
def test_a_run_that_goes_on_ends_as_the_whole_one(runs, job):
    whole, again = ended(runs, job), ended(runs, f"{job} again")
    one, other = (load_file(out / "adapter_model.safetensors") for out in (whole, again))
    assert one.keys() == other.keys() and len(one) >= 28
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name
        assert "lora_B" not in name or tensor.abs().sum() > 0
    assert logged(whole, "loss")[-1] == logged(again, "loss")[-1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_merges(runs, strategy):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_config(runs / "cfg.yaml").config.base_model
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(plain, ended(runs, f"lora {strategy}"))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            before = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    assert (adapted - merged).abs().max() < 1e-4 and (adapted - before).abs().max() > 0.1


def test_nothing_is_left_half_written(runs):
    assert not [p for p in (runs / "out").rglob(".*") if p.is_dir()]
