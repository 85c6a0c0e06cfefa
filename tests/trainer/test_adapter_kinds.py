"""Where an adapter starts from: PiSSA, OLoRA, LoftQ, one that was trained before; ReLoRA's restarts.

What could break: an adapter that means another base than the one it is saved for; a restart that changes the
function; a start that is not PEFT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyfastlora.trainer.relora import pruned
from pyfastlora.trainer.stacked import Earlier, add_to_base, linears, stack

from .test_config import GOOD
from .test_resume import invoke, run

TOKENS = torch.arange(2, 42).reshape(2, 20)


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def adapted(folder: Path, init: Any = True, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=init, **settings)
    return get_peft_model(base(folder), lora)


def moved(model: PeftModel) -> PeftModel:
    """As after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_pefts_and_what_is_left_is_for_the_untouched_base(tiny_model, tmp_path, init, settings):
    theirs, ours = adapted(tiny_model, init, **settings), adapted(tiny_model, **settings)
    earlier = Earlier(ours)
    earlier.begin(init)
    for (_, one), (_, other) in zip(linears(theirs), linears(ours), strict=True):
        for which in ("lora_A", "lora_B"):
            assert getattr(one, which)["default"].weight.equal(getattr(other, which)["default"].weight)
        torch.testing.assert_close(one.get_base_layer().weight, other.get_base_layer().weight)
    torch.testing.assert_close(logits(ours), logits(base(tiny_model)), atol=1e-5, rtol=1e-4)

    moved(ours).save_pretrained(tmp_path)
    earlier.write(tmp_path)
    stack(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    left = PeftModel.from_pretrained(base(tiny_model), tmp_path)
    assert (logits(ours) - logits(base(tiny_model))).abs().max() > 0.05
    torch.testing.assert_close(logits(left), logits(ours), atol=1e-4, rtol=1e-4)


def test_a_restart_leaves_the_function_and_its_parts_add_up(tiny_model, tmp_path):
    model = moved(adapted(tiny_model))
    earlier, before = Earlier(model), logits(model)
    earlier.took(1)
    with torch.no_grad():
        for _, layer in linears(model):
            add_to_base(layer, layer.lora_B["default"].weight, layer.lora_A["default"].weight)
            layer.lora_B["default"].weight.zero_()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    moved(model).save_pretrained(tmp_path)
    earlier.write(tmp_path)
    again = adapted(tiny_model)
    Earlier(again).read(tmp_path)
    for (_, one), (_, other) in zip(linears(model), linears(again), strict=True):
        assert one.get_base_layer().weight.equal(other.get_base_layer().weight)
    stack(tmp_path)
    left = PeftModel.from_pretrained(base(tiny_model), tmp_path)
    torch.testing.assert_close(logits(left), logits(model), atol=1e-4, rtol=1e-4)


def test_pruning_keeps_the_largest():
    state = torch.tensor([[0.1, -5.0, 0.2], [3.0, -0.3, 0.0]])
    assert pruned(state, 0.5).tolist() == [[0, -5, 0], [3, pytest.approx(-0.3), 0]]
    assert pruned(state, 1.0).abs().sum() == 0 and pruned(state, 0.0).equal(state)


def test_relora_run(write_jsonl, alpaca_rows, config_file, tmp_path, tiny_model):
    """Restarts at 2 and 4 of 5 steps: three parts, a rate that comes back, no states of before."""
    config = config_file(
        write_jsonl(alpaca_rows),
        "relora_steps: 2\njagged_restart_warmup_steps: 1\n",
    )
    saves = ("--save-strategy", "steps", "--save-steps", "1")
    settings = ("--set", "adapter=relora", "--max-steps", "5", *saves)
    run(config, *settings)
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["event"] == "train"]
    assert rates == pytest.approx([1e-2, 1e-2, 0.5e-2, 1e-2, 0.5e-2])
    saved = load_file(out / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in saved.items() if "lora_A" in n} == {24}
    at_restart = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert all(t.abs().sum() == 0 for n, t in at_restart.items() if "lora_B" in n)
    parts = load_file(out / "checkpoint-2" / "earlier.safetensors")
    for name, tensor in saved.items():
        rows = tensor[8:16] if "lora_A" in name else tensor[:, 8:16]
        assert rows.equal(parts[f"0:{name}"])
    evaluated = run_verb("evaluate", config, "--checkpoint", "5")
    assert evaluated == run_verb("evaluate", config)


def run_verb(name: str, config: Path, *arguments: str) -> str:
    """What evaluate prints of loss, on the training data."""
    from click.testing import CliRunner

    from pyfastlora.cli.evaluate import evaluate

    text = config.read_text()
    if "test_datasets" not in text:
        data = text.partition("path: ")[2].partition("\n")[0]
        config.write_text(f"{text}test_datasets:\n  - path: {data}\n    type: alpaca\nrelora: true\n")
    result = CliRunner().invoke(evaluate, [str(config), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return "\n".join(line for line in result.stdout.splitlines() if "loss" in line and "out" not in line)


def test_going_on_with_an_adapter(write_jsonl, alpaca_rows, config_file, tmp_path):
    data = write_jsonl(alpaca_rows)
    run(config_file(data))
    text = config_file(data).read_text()
    for key in ("lora_target_linear", "lora_r", "lora_alpha"):
        text = "".join(line for line in text.splitlines(True) if not line.startswith(key))
    more = tmp_path / "more.yaml"
    more.write_text(f"{text}lora_model_dir: {tmp_path}/out\n")
    run(more, "--output-dir", f"{tmp_path}/more", "--max-steps", "1")
    first, more_lines = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("out", "more")
    )
    losses = [line["loss"] for line in first if line["event"] == "train"]
    assert next(line["loss"] for line in more_lines if line["event"] == "train") < 0.9 * losses[0]
    other = invoke(more, "--output-dir", f"{tmp_path}/other", "--set", "lora_r=4")
    assert other.exit_code == 2 and "lora_r is 4, and 8 in the adapter of lora_model_dir" in other.stderr
    nowhere = invoke(more, "--output-dir", f"{tmp_path}/x", "--set", f"lora_model_dir={tmp_path}/nowhere")
    assert nowhere.exit_code == 2 and "nowhere holds no adapter" in nowhere.stderr


def test_loftq_makes_up_for_4_bits(write_jsonl, alpaca_rows, config_file, tmp_path, tiny_model):
    """The start on a 4-bit base is nearer to the dense model than that base is."""
    from transformers import AutoTokenizer

    from pyfastlora.trainer.adapter import add_adapter
    from pyfastlora.trainer.config.load import load_config
    from pyfastlora.trainer.model import load_base
    from pyfastlora.trainer.precision import resolve_precision

    path = config_file(write_jsonl(alpaca_rows), "peft_init_lora_weights: loftq\n")
    path.write_text(path.read_text().replace("adapter: lora", "adapter: qlora"))
    config = load_config(path).config
    device = torch.device("cpu")
    precision = resolve_precision(config, device)
    model = add_adapter(
        load_base(config, precision, device), config, precision, AutoTokenizer.from_pretrained(tiny_model)
    )
    wanted = logits(base(tiny_model))
    started = (logits(model) - wanted).norm()
    with model.disable_adapter():
        assert started < 0.9 * (logits(model) - wanted).norm()


def test_layers_and_tokens(write_jsonl, alpaca_rows, config_file, tmp_path):
    config = config_file(
        write_jsonl(alpaca_rows),
        "peft_layers_to_transform: 1\ntokens: [<new>, <newer>]\npeft_trainable_token_indices: new\n"
        "resize_token_embeddings_to_32x: true\n",
    )
    run(config, "--max-steps", "1")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".layers.1." in name for name in weights if "lora_" in name)
    rows = [tensor for name, tensor in weights.items() if "token" in name]
    assert [tuple(t.shape) for t in rows] == [(2, 64)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("peft_init_lora_weights: eva\n", "make the adapter with PEFT, and give it as lora_model_dir"),
        ("peft_init_lora_weights: pisa\n", "must be one of true, gaussian, pissa"),
        ("peft_init_lora_weights: loftq\n", "it goes with adapter: qlora"),
        ("relora: true\n", "after how many steps is the adapter merged? set relora_steps"),
        ("relora_steps: 5\npeft_use_dora: true\n", "a DoRA, which also scales it, is no sum"),
        ("relora_steps: 5\noptimizer: adamw_bnb_8bit\n", "which adamw_bnb_8bit packs"),
        ("relora_steps: 5\nstrategy: fsdp2\n", "which fsdp2 divides; use ddp"),
        ("relora_steps: 5\nload_in_8bit: true\n", "relora changes the base, and a quantised one"),
        ("relora_prune_ratio: 0.5\n", "relora_prune_ratio goes with relora: true"),
        ("jagged_restart_steps: 5\n", "jagged_restart_steps goes with relora: true"),
        ("lora_model_dir: x\npeft_init_lora_weights: pissa\n", "is of a fresh adapter"),
        ("peft_trainable_token_indices: new\n", "means the rows of `tokens`"),
    ],
)
def test_keys_that_do_not_fit(mistakes, text, sentence):
    assert sentence in "\n".join(mistakes(GOOD + text))


def test_names_of_relora(load):
    plain = GOOD.replace("adapter: lora\n", "")
    of_today = "adapter: lora\nrelora: true\njagged_restart_steps: 5\n"
    for text in ("adapter: relora\nrelora_steps: 5\n", "adapter: lora\nrelora_steps: 5\n", of_today):
        config = load(plain + text).config
        assert (config.adapter, config.relora, config.relora_steps) == ("lora", True, 5)
