"""`fastlora train` end to end on a tiny model: what it learns, what it writes, and what its numbers mean."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pyfastlora.cli.train import train
from pyfastlora.trainer.config.load import load_config


def run(config: Path, *overrides: str) -> str:
    arguments = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(train, [str(config), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def log(out: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file, tmp_path) -> Path:
    held_out = write_jsonl(alpaca_rows[:5], "held_out.jsonl")
    return config_file(
        write_jsonl(alpaca_rows),
        f"test_datasets:\n  - path: {held_out}\n    type: alpaca\neval_on_start: true\n",
    )


@pytest.mark.parametrize("fastlora", ["true", "false"], ids=["fastlora", "peft"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_trains_and_saves(config, tmp_path, adapter, fastlora):
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    output = run(config, f"adapter={adapter}", f"fastlora={fastlora}")
    out = tmp_path / "out"

    losses = [line["loss"] for line in log(out, "train")]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    before, after = (line["eval_loss"] for line in log(out, "eval"))
    assert after < before - 0.3
    assert "step 6/6: loss" in output and "held-out loss" in output
    assert (out / "kernels.json").exists() == (out / "kernels.txt").exists() == (fastlora == "true")
    if fastlora == "true":  # with the groups that training found, and how often each ran
        report = (out / "kernels.txt").read_text().strip()
        assert report in output and re.search(r"q_proj.* fused group q_proj, k_proj, v_proj .* [1-9]", report)

    from peft import PeftModel

    base = base_of(config)
    model = PeftModel.from_pretrained(base, out)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    if adapter == "lora":  # the 4-bit base rounds, so only the dense one can be compared
        assert after == pytest.approx(
            loss_per_response_token(model, out, tmp_path / "held_out.jsonl"), abs=1e-4
        )


def base_of(config: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(load_config(config).config.base_model, dtype="float32")


def loss_per_response_token(model, out: Path, data: Path) -> float:
    """The held-out loss computed row by row from its definition."""
    import torch
    from transformers import AutoTokenizer

    from pyfastlora.trainer.data.alpaca import prompt

    tokenizer, total, count = AutoTokenizer.from_pretrained(out), 0.0, 0
    for row in map(json.loads, data.read_text().splitlines()):
        question = tokenizer(prompt(row["instruction"], row["input"]))["input_ids"]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([question + answer])).logits[0].double()
        scores = logits.log_softmax(-1)[len(question) - 1 : -1]
        total -= scores[torch.arange(len(answer)), torch.tensor(answer)].sum().item()
        count += len(answer)
    return total / count


def test_run_directory(config, tmp_path):
    run(config, "fastlora=false", "max_steps=1", "save_strategy=steps", "save_steps=1")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "checkpoint-1"),
        *("config.original.yaml", "config.resolved.yaml", "env.json", "data.json", "log.jsonl"),
        *("plan.json", "strategy.json", "report.html", "README.md"),
    }
    assert (out / "config.original.yaml").read_text() == config.read_text()
    assert load_config(out / "config.resolved.yaml").config.max_steps == 1
    assert json.loads((out / "env.json").read_text())["packages"]["peft"]
    assert json.loads((out / "data.json").read_text())["train_samples"] == 24
    assert [line["event"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())] == [
        *("start", "eval", "train", "eval", "end"),
    ]


def test_accumulation_averages_over_tokens(config, tmp_path):
    """Responses differ in length: averaging over micro-batches would give another loss and gradient."""
    settings = ("fastlora=false", "max_steps=2", "eval_on_start=false")
    run(config, *settings, "micro_batch_size=6", f"output_dir={tmp_path}/one")
    run(
        config,
        *settings,
        "micro_batch_size=2",
        "gradient_accumulation_steps=3",
        f"output_dir={tmp_path}/three",
    )
    for one, three in zip(log(tmp_path / "one", "train"), log(tmp_path / "three", "train"), strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(one[key], three[key], rel_tol=1e-4)
        assert one["tokens"] == three["tokens"] and one["trained_tokens"] == three["trained_tokens"]


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    for name in ("a", "b"):
        run(config, "fastlora=false", "max_steps=2", "lora_dropout=0.3", f"output_dir={tmp_path}/{name}")
    a, b = ([line["loss"] for line in log(tmp_path / name, "train")] for name in "ab")
    assert a == b


def test_options_that_shape_batches_and_steps(config, tmp_path):
    run(
        config,
        *("fastlora=false", "max_steps=", "num_epochs=2", "micro_batch_size=4", "group_by_length=true"),
        *(
            "pad_to_sequence_len=true",
            "gradient_checkpointing=true",
            "neftune_noise_alpha=5",
            "logging_steps=3",
        ),
        *(
            "evals_per_epoch=2",
            "warmup_ratio=0.5",
            "lr_scheduler=linear",
            "optimizer=sgd",
            "train_on_inputs=true",
        ),
    )
    out = tmp_path / "out"
    steps = log(out, "train")
    assert [line["step"] for line in steps] == [3, 6, 9, 12]
    assert [line["step"] for line in log(out, "eval")] == [0, 3, 6, 9, 12]
    assert (
        steps[1]["learning_rate"] > steps[0]["learning_rate"]
        and steps[3]["learning_rate"] < steps[1]["learning_rate"]
    )


def test_new_tokens_are_trained_and_saved(config, tmp_path):
    run(
        config,
        "fastlora=false",
        "max_steps=1",
        "tokens=[<x>]",
        "lora_modules_to_save=[embed_tokens, lm_head]",
    )
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<x>") == 384
    saved = load_file(out / "adapter_model.safetensors")
    assert sorted(k.split(".")[-2] for k, v in saved.items() if len(v) == 385) == ["embed_tokens", "lm_head"]

    base = base_of(config)
    base.resize_token_embeddings(385)
    model = PeftModel.from_pretrained(base, out)
    assert model.get_input_embeddings()(torch.tensor([384])).abs().sum() > 0


def test_dora_and_chosen_targets_reach_the_adapter(config, tmp_path):
    run(
        config,
        "fastlora=false",
        "max_steps=1",
        "peft_use_dora=true",
        "lora_target_linear=false",
        "lora_target_modules=[q_proj, down_proj]",
        "lora_alpha=32",
    )
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["use_dora"] and sorted(adapter["target_modules"]) == ["down_proj", "q_proj"]
    assert adapter["r"] == 8 and adapter["lora_alpha"] == 32


@pytest.mark.parametrize("bf16, dtype", [("full", "torch.bfloat16"), ("true", "torch.float32")])
def test_adapter_dtype_follows_bf16(config, tmp_path, bf16, dtype):
    run(config, "fastlora=false", "max_steps=1", f"bf16={bf16}")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {dtype}


def test_resolved_config_runs_again(config, tmp_path):
    run(config, "fastlora=false", "max_steps=1")
    resolved = tmp_path / "out" / "config.resolved.yaml"
    assert yaml.safe_load(resolved.read_text())["learning_rate"] == 1e-2
    run(resolved, f"output_dir={tmp_path}/again")
    first, again = (log(tmp_path / name, "train")[0]["loss"] for name in ("out", "again"))
    assert first == again
