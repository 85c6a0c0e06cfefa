"""`fastlora merge-lora`: the model that it writes against PEFT's adapter, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyfastlora.cli.merge_lora import merge_lora
from pyfastlora.trainer import merge as merging
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.model import load_base
from pyfastlora.trainer.precision import resolve_precision

CPU = torch.device("cpu")
IDS = torch.tensor([[0, *range(100, 140), 383, 382, 300]])
LAYER = "model.layers.1.mlp.down_proj"


def run(config: Path, *arguments: object) -> Result:
    return CliRunner().invoke(merge_lora, [str(config), *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def config(config_file: Callable[..., Path], tmp_path: Path) -> Path:
    return config_file(tmp_path / "no_data.jsonl")


@pytest.fixture
def make_adapter(tiny_model: Path) -> Callable[..., Path]:
    """make_adapter(folder, seed=1, **lora): an adapter that changes the tiny model, in PEFT's format."""

    def make(folder: Path, seed: int = 1, base: Any = None, **lora: Any) -> Path:
        torch.manual_seed(seed)
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
        model = get_peft_model(base, LoraConfig(**settings))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * (0.05 if "lora_" in name else 0.02))
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.double()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def merged_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.3},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": [382, 383]},
    ],
    ids=["lora", "rslora", "dora", "embedding", "modules_to_save", "tokens"],
)
def test_the_merged_model_answers_as_the_adapter(config, make_adapter, tiny_model, tmp_path, lora):
    make_adapter(tmp_path / "out", **lora)
    result = run(config)
    assert result.exit_code == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    got = logits(merged_model(tmp_path / "out/merged"))
    assert difference(got, wanted) < 1e-5 and difference(before, wanted) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "out/merged").eos_token == "</s>"
    assert merged_model(tmp_path / "out/merged").config.use_cache is True
    said = json.loads((tmp_path / "out/merged/merge.json").read_text())
    assert said["logits_differ_by"] < 1e-5 < said["adapter_changes_logits_by"]
    assert "logits of the merged model and of the adapter differ by" in result.stdout


def test_tied_embeddings_part_where_one_of_them_is_adapted(make_adapter, config_file, tiny_model, tmp_path):
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    make_adapter(tmp_path / "out", base=base, target_modules=["embed_tokens", "q_proj"])
    wanted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), tmp_path / "out")
    )
    result = run(config_file(tmp_path / "no_data.jsonl"), "--base-model", tmp_path / "tied")
    assert result.exit_code == 0, result.stderr
    merged = merged_model(tmp_path / "out/merged")
    assert difference(logits(merged), wanted) < 1e-5
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [None, 4, 8], ids=["dense", "4bit", "8bit"])
def test_weights_are_summed_and_rounded_once(config, make_adapter, tmp_path, bits, dtype):
    """W + s B A in float64, W read with our own decoders of bitsandbytes' formats."""
    if bits:
        pytest.importorskip("bitsandbytes")
    make_adapter(tmp_path / "out")
    keys = {None: (), 4: ("--set", "adapter=qlora"), 8: ("--set", "load_in_8bit=true")}[bits]
    result = run(config, *keys, "--bf16", "full", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = (saved[f"base_model.model.{LAYER}.lora_{x}.weight"].double() for x in "AB")
    loaded = load_config(config, [*(k for k in keys if "=" in k), "bf16=full"]).config
    layer = load_base(loaded, resolve_precision(loaded, CPU), CPU).get_submodule(LAYER)
    values = dense_values(layer, bits)
    exact = values + 2 * b @ a
    got = load_file(tmp_path / "out/merged/model.safetensors")[f"{LAYER}.weight"]
    assert got.dtype == getattr(torch, dtype)
    roundings = {"bfloat16": 2**-8, "float32": 2**-22}[dtype]
    # where the base has 8 bits, it is rounded too
    bound = roundings * exact.abs() + (roundings * values.abs() if bits == 8 else 0)
    assert ((got.double() - exact).abs() <= bound + 2**-26).all()
    assert "quantization_config" not in json.loads((tmp_path / "out/merged/config.json").read_text())


def dense_values(layer: Any, bits: int | None) -> torch.Tensor:
    from pyfastlora.ops import Packed8bit, dequant_8bit
    from pyfastlora.weights.bnb_4bit import Bnb4bitWeight

    if bits == 4:
        packed = Bnb4bitWeight.of(layer.weight, layer.weight.quant_state, None)
        return packed.dequantize(torch.empty(packed.shape, dtype=torch.bfloat16)).double()
    if bits == 8:
        return dequant_8bit(Packed8bit(layer.weight.data, layer.weight.SCB, torch.float32)).double()
    return layer.weight.detach().double()


def test_adapters_are_added_up_by_weight(config, make_adapter, tiny_model, tmp_path):
    """Of different ranks, scalings and targets; the oracle is PEFT's exact combination, `cat`."""
    a = make_adapter(tmp_path / "a", seed=1)
    b = make_adapter(tmp_path / "b", seed=2, r=6, use_rslora=True, target_modules=["q_proj", "up_proj"])
    result = run(config, "--adapter", a, "--adapter", b, "--weights", "0.7,-0.3", "-o", tmp_path / "sum")
    assert result.exit_code == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    state = {name: weight.double() for name, weight in base.state_dict().items()}
    for folder, share, scaling in ((a, 0.7, 2), (b, -0.3, 8 / 6**0.5)):
        saved = load_file(folder / "adapter_model.safetensors")
        for name in [n for n in saved if "lora_A" in n]:
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            delta = saved[name.replace("lora_A", "lora_B")].double() @ saved[name].double()
            state[weight] = state[weight] + share * scaling * delta
    got = load_file(tmp_path / "sum/model.safetensors")
    for name, exact in state.items():
        assert (got[name].double() - exact).abs().max() < 1e-6, name


def test_a_quantised_job_can_be_merged_into_the_bases_own_weights(config, make_adapter, tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_adapter(tmp_path / "out", use_dora=True)
    wanted = logits(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path / "out"
        )
    )
    result = run(config, "--set", "adapter=qlora", "--no-dequant", "-o", tmp_path / "own")
    assert result.exit_code == 0 and "not those the adapter was trained on" in result.stdout, result.stderr
    assert difference(logits(merged_model(tmp_path / "own")), wanted) < 1e-5
    result = run(config, "--set", "adapter=qlora")
    assert result.exit_code == 0, result.stderr
    assert difference(logits(merged_model(tmp_path / "out/merged")), wanted) > 1e-2  # 4 bits are others


def test_a_wrong_merge_is_not_written(config, make_adapter, tmp_path, monkeypatch):
    make_adapter(tmp_path / "out")
    merged = merging._merged

    def wrong(*arguments: Any) -> Any:
        model = merged(*arguments)
        model.get_submodule(LAYER).weight.data *= 1.1
        return model

    monkeypatch.setattr(merging, "_merged", wrong)
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    result = run(config)
    assert (
        result.exit_code == 1 and "(at most 1e-04)" in result.stderr and "nothing is written" in result.stderr
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_a_write_that_fails_leaves_nothing(config, make_adapter, tmp_path, monkeypatch):
    make_adapter(tmp_path / "out")

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    result = run(config, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert result.stderr.endswith("could not be written: No space left on device; nothing is left of it\n")
    assert not [p for p in tmp_path.iterdir() if "merged" in p.name]


def test_a_small_change_is_lost_in_bfloat16_and_said_to_be(config, make_adapter, tmp_path):
    make_adapter(tmp_path / "out", lora_alpha=0.01)
    result = run(config, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "--dtype float32 keeps the adapter whole" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "output_dir: {tmp}/out: no such folder; an adapter of PEFT's format is needed"),
        (("--adapter", "{tmp}"), 2, "--adapter: {tmp} has no adapter_config.json; it holds "),
        (("--checkpoint", "3"), 2, "--checkpoint 3: {tmp}/out has no such checkpoint; it has none"),
        (
            ("--adapter", "{tmp}/a", "--checkpoint", "3"),
            2,
            "--adapter and --checkpoint mean different models",
        ),
        (("--adapter", "{tmp}/a", "--weights", "1,2"), 2, "--weights: 2 for 1 adapters; give one for each"),
        (
            ("--adapter", "{tmp}/a", "--weights", "x"),
            2,
            "--weights must be numbers with commas between; got x",
        ),
        (("--adapter", "{tmp}/dora", "--weights", "0.5"), 2, "DoRA scales the sum of base and adapter"),
        (("--adapter", "{tmp}/whole", "--adapter", "{tmp}/a"), 2, "whole has modules_to_save: that is no"),
        (("--adapter", "{tmp}/a", "--dequant"), 2, "--dequant goes with a quantised base"),
        (
            ("--adapter", "{tmp}/a", "-o", "{tmp}/a"),
            2,
            "--output: {tmp}/a is not empty (it holds README.md, ",
        ),
        (("--adapter", "{tmp}/wide"), 1, "wide: the adapter does not fit its base: "),
        (("--adapter", "{tmp}/less"), 1, "less: the adapter lacks weights for modules"),
        (("--set", "adapter="), 2, "goes with adapter: lora or qlora"),
    ],
)
def test_mistakes(config, adapters, tmp_path, arguments, code, sentence):
    result = run(config, *(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == code and sentence.format(tmp=tmp_path) in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapters(make_adapter: Callable[..., Path], tmp_path: Path, request: Any) -> None:
    """Good and bad ones; only those that a test names are made."""
    named = " ".join(request.node.callspec.params["arguments"])
    kinds = {
        "a": {},
        "dora": {"use_dora": True},
        "whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        "wide": {},
        "less": {},
    }
    for kind, lora in kinds.items():
        if f"{{tmp}}/{kind}" in named:
            folder = make_adapter(tmp_path / kind, **lora)
            if kind in ("wide", "less"):
                file = folder / "adapter_config.json"
                changed = {"wide": {"r": 16}, "less": {"target_modules": ["q_proj", "embed_tokens"]}}[kind]
                file.write_text(json.dumps(json.loads(file.read_text()) | changed))
