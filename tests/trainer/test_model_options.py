"""What a model is built and run with: attention, values of its config.json, compilation, checkpointing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, modeling_utils

from pyfastlora.trainer.attention import ATTENTION, check_attention
from pyfastlora.trainer.config.model import ATTENTIONS
from pyfastlora.trainer.errors import ConfigError, UserError
from pyfastlora.trainer.model_config import apply_overrides
from pyfastlora.trainer.precision import Precision

from .test_config import GOOD
from .test_resume import curve, invoke, run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FULL = Precision(torch.float32, None, torch.float32)
HALF = Precision(torch.bfloat16, torch.bfloat16, torch.float32)


def test_the_table_has_every_attention():
    assert set(ATTENTION) == set(ATTENTIONS)


@pytest.mark.parametrize(
    ("name", "device", "precision", "sentence"),
    [
        ("flash_attention_2", CPU, HALF, "flash_attention_2 has GPU kernels only; say sdpa"),
        ("flash_attention_3", GPU, HALF, "needs the package flash_attn_interface or kernels"),
        ("flex_attention", CPU, FULL, "flex_attention has no backward pass on a CPU; say sdpa"),
        ("flash_attention_2", GPU, FULL, "computes in 16 bits; set bf16: true"),
        ("eager", CPU, FULL, None),
        ("flex_attention", GPU, FULL, None),
    ],
)
def test_what_an_attention_needs(load, monkeypatch, name, device, precision, sentence):
    there = {"flash_attn"} if precision is FULL else set()
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package if package in there else None)
    config = load(GOOD + f"attn_implementation: {name}\n").config
    if sentence is None:
        check_attention(config, device, precision)
    else:
        with pytest.raises(UserError, match=sentence):
            check_attention(config, device, precision)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attn_implementation: flash\n", "flash_attention_2 takes its place"),
        ("attn_implementation: sage\n", "sage has no backward pass; say sdpa"),
        ("torch_compile_mode: default\n", "torch_compile_mode goes with torch_compile: true"),
        ("torch_compile: true\nstrategy: fsdp2\n", "torch_compile would trace the gathering of weights"),
        ("early_stopping_patience: 2\n", "early_stopping_patience goes by the held-out loss"),
    ],
)
def test_keys_that_do_not_fit(mistakes, text, sentence):
    assert sentence in "\n".join(mistakes(GOOD + text))


def test_rope_is_scaled_as_the_old_key_says(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    theta = config.rope_parameters["rope_theta"]
    scaled = apply_overrides(config, {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert scaled.rope_parameters == {"rope_theta": theta, "rope_type": "linear", "factor": 4.0}


def test_rope_of_one_kind_of_layer():
    config = AutoConfig.for_model("gemma3_text")
    before = config.rope_parameters["sliding_attention"]
    given = {"full_attention": {"type": "linear", "factor": 4.0}}
    scaled = apply_overrides(config, {"rope_parameters": given}).rope_parameters
    assert scaled["full_attention"]["rope_type"] == "linear" and scaled["full_attention"]["factor"] == 4.0
    assert "rope_theta" in scaled["full_attention"] and scaled["sliding_attention"] == before
    with pytest.raises(ConfigError, match=r"for each kind of layer; say which: .*full_attention"):
        apply_overrides(config, {"rope_scaling": {"type": "linear", "factor": 4.0}})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"hidden_sice": 4}, "LlamaConfig has no such value; did you mean hidden_size?"),
        ({"rope_scaling": {"type": "square", "factor": 2}}, "type must be one of .*linear.*; got square"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be a number of at least 1; got 0.5"),
    ],
)
def test_overrides_that_cannot_be(tiny_model, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        apply_overrides(AutoConfig.from_pretrained(tiny_model), overrides)


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file):
    return config_file(write_jsonl(alpaca_rows))


def losses(out) -> list[float]:
    return [line["loss"] for line in curve(out) if line["event"] == "train"]


def test_overrides_reach_the_model(config, tmp_path):
    run(config)
    text = config.read_text()
    config.write_text(f"{text}rope_scaling: {{type: linear, factor: 8.0}}\n")
    run(config, "--output-dir", f"{tmp_path}/rope")
    assert losses(tmp_path / "rope")[0] != losses(tmp_path / "out")[0]
    config.write_text(f"{text}overrides_of_model_config: {{rms_norm_epz: 1}}\n")
    wrong = invoke(config, "--output-dir", f"{tmp_path}/wrong")
    assert wrong.exit_code == 2 and "did you mean rms_norm_eps?" in wrong.stderr


def test_compiled_it_learns_the_same(config, tmp_path):
    run(config, "--max-steps", "3")
    settings = ("--set", "torch_compile=true", "--set", "torch_compile_backend=eager")
    run(config, "--max-steps", "3", "--output-dir", f"{tmp_path}/fast", *settings)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "out"), rel=1e-4)


def test_every_other_layer_is_recomputed(config, tmp_path, monkeypatch):
    calls, real = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    run(config, "--max-steps", "2")
    assert not calls
    counts = {}
    for every in (1, 2):  # of two layers
        calls.clear()
        kwargs = f"gradient_checkpointing_kwargs={{every_n_layers: {every}}}"
        settings = ("--set", "activation_checkpointing=true", "--set", kwargs)
        run(config, "--max-steps", "2", "--output-dir", f"{tmp_path}/{every}", *settings)
        counts[every] = len(calls)
        assert losses(tmp_path / str(every)) == losses(tmp_path / "out")
    assert counts[1] == 2 * counts[2] > 0


def test_training_stops_where_it_no_longer_helps(config, tmp_path, write_jsonl, alpaca_rows):
    """At a rate that makes things worse, after two evaluations without a lower loss; and says so."""
    held_out = write_jsonl(alpaca_rows[:5], "held_out.jsonl")
    config.write_text(
        f"{config.read_text()}test_datasets:\n  - path: {held_out}\n    type: alpaca\n"
        "eval_steps: 1\nearly_stopping_patience: 2\neval_on_start: true\n"
    )
    output = run(config, "--learning-rate", "10", "--set", "max_steps=6")
    evaluated = [line["eval_loss"] for line in curve(tmp_path / "out") if line["event"] == "eval"]
    evaluated = list(map(float, evaluated))  # "nan" is text in JSON
    end = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end" and end["step"] < 6
    assert min(evaluated[-2:]) >= min(evaluated[:-2])
    assert "no lower held-out loss in 2 evaluations" in output
