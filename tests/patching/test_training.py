"""Steps of AdamW on a small random Llama: the losses are PEFT's, feature by feature and mode by mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accuracy import DEVICE, bitsandbytes
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import pyfastlora

from .models import with_noise

STEPS = 5
LINEARS = 2 * 7  # q, k, v, o, gate, up, down in each of two layers

FEATURES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.2},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.2},
    "bias": {"bias": "all"},
    "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 16}, "alpha_pattern": {"q_proj": 3}},
}


def llama(
    packed: bool = False, dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8
) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if packed:
        quantise(model, dtype, storage)
    return model


def quantise(model: nn.Module, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
    """What from_pretrained(load_in_4bit) makes of a model, without files."""
    bnb = bitsandbytes()
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    dense = copy.deepcopy(model.state_dict())
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            options = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": storage}
            dense_weight = dense[f"{name}.weight"]
            module.weight = bnb.nn.Params4bit(dense_weight, requires_grad=False, module=module, **options)
            if module.bias is not None:
                module.bias = nn.Parameter(dense[f"{name}.bias"])
            module.to(DEVICE)
    model.is_loaded_in_4bit = True


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **config}
    return with_noise(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)), 0.05)


def losses(model: nn.Module, autocast: torch.dtype | None = None, evaluate: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    drawn = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(4), device="cpu")
    tokens = drawn.to(DEVICE)
    torch.manual_seed(11)
    found = []
    for _ in range(STEPS):
        model.train()
        with torch.autocast(DEVICE.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=tokens)
    return found


def assert_same_curve(ours: nn.Module, peft: nn.Module, bound: float, **options: Any) -> None:
    theirs, mine = losses(peft, **options), losses(ours, **options)
    assert theirs[-1] < theirs[0] - 0.1  # it learns: a curve that stays flat would compare nothing
    assert mine == pytest.approx(theirs, rel=bound)
    for row in pyfastlora.report(ours):
        assert (row.fused, row.calls_fallback) == (True, 0) and row.calls_fused >= STEPS, row


@pytest.mark.parametrize("config", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
def test_losses_are_pefts(config: dict[str, Any], packed: bool) -> None:
    peft = adapted(llama(packed), **config)
    ours = copy.deepcopy(peft)
    assert pyfastlora.patch(ours).fused == LINEARS
    assert_same_curve(ours, peft, 1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("config", [{"lora_dropout": 0.2}, {"use_dora": True}], ids=["dropout", "dora"])
def test_gradient_checkpointing(config: dict[str, Any], reentrant: bool) -> None:
    """The recomputation draws the same dropout mask, and counts as a call."""
    peft = adapted(llama(), **config)
    ours = copy.deepcopy(peft)
    for model in (peft, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    pyfastlora.patch(ours)
    assert_same_curve(ours, peft, 1e-5)
    assert pyfastlora.report(ours)["layers.0.self_attn.q_proj"].calls_fused == 2 * STEPS


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "4-bit"])
def test_bfloat16_base_under_autocast(config: dict[str, Any], packed: bool) -> None:
    """What `bf16: true` does in the HF Trainer: float32 adapters over a bfloat16 base."""
    peft = adapted(llama(packed, torch.bfloat16), **config)
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    assert_same_curve(ours, peft, 5e-3, autocast=torch.bfloat16)


def test_4bit_training_with_evaluations_in_between() -> None:
    """PEFT runs without evaluations here: with them it loses gradients where bitsandbytes repacks."""
    peft = adapted(llama(packed=True))
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    assert losses(ours, evaluate=True) == pytest.approx(losses(peft), rel=1e-5)


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    peft = adapted(llama()).eval()
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    prompt = torch.arange(5)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompt, **options), peft.generate(prompt, **options))
    assert pyfastlora.report(ours)["layers.0.self_attn.q_proj"].calls_fused == 12
