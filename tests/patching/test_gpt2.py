"""A small random GPT-2: linears with transposed weights, adapted embeddings, one of them tied to the head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pyfastlora

from .models import assert_close, assert_equal, patched_copy, with_noise

STEPS = 8
LAYERS = ["c_attn", "c_proj", "c_fc", "wte", "wpe"]
FEATURES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.2, "bias": "lora_only"},
    "tied": {"target_modules": [*LAYERS, "lm_head"]},
}


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).to(DEVICE, dtype)


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": LAYERS, "fan_in_fan_out": True, **config}
    model = get_peft_model(gpt2(dtype), LoraConfig(task_type="CAUSAL_LM", **settings))
    return with_noise(model, 0.05)  # type: ignore[return-value]


def losses(model: nn.Module, autocast: torch.dtype | None = None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    drawn = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(4), device="cpu")
    tokens = drawn.to(DEVICE)
    torch.manual_seed(11)
    found = []
    for _ in range(STEPS):
        with torch.autocast(DEVICE.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def assert_same_curve(ours: nn.Module, peft: nn.Module, bound: float, **options: Any) -> None:
    theirs, mine = losses(peft.train(), **options), losses(ours.train(), **options)
    assert theirs[-1] < theirs[0] - 0.1
    assert mine == pytest.approx(theirs, rel=bound)
    for row in pyfastlora.report(ours):
        assert (row.fused, row.calls_fallback) == (True, 0) and row.calls_fused >= STEPS, row


@pytest.mark.parametrize("config", FEATURES.values(), ids=FEATURES)
def test_losses_are_pefts(config: dict[str, Any]) -> None:
    peft = adapted(**config)
    ours = patched_copy(peft)
    assert_same_curve(ours, peft, 2e-5)
    regions = {name: pyfastlora.report(ours)[name].region for name in ("wte", "wpe", "h.0.mlp.c_fc")}
    assert regions == {"wte": "embedding", "wpe": "embedding", "h.0.mlp.c_fc": "linear"}


def test_bfloat16_base_under_autocast() -> None:
    peft = adapted(torch.bfloat16)
    assert_same_curve(patched_copy(peft), peft, 1e-2, autocast=torch.bfloat16)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    peft = adapted(use_dora=True)
    ours = copy.deepcopy(peft)
    for model in (peft, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    pyfastlora.patch(ours)
    assert_same_curve(ours, peft, 2e-5)
    assert pyfastlora.report(ours)["h.0.mlp.c_fc"].calls_fused == 2 * STEPS


def test_adapters_that_peft_ties() -> None:
    """PEFT gives the head the embedding's own factors, turned round; such a model cannot be copied."""
    peft, ours = (adapted(target_modules=["wte", "lm_head"], ensure_weight_tying=True) for _ in range(2))
    assert pyfastlora.patch(ours).fused == 2
    assert_same_curve(ours, peft, 2e-5)


def test_verified_and_saved(tmp_path: Path) -> None:
    peft = adapted()
    ours = copy.deepcopy(peft)
    found = pyfastlora.patch(ours, verify=True)
    assert found.fused == found.total == 10 and found.summary() == "fused 10 of 10 LoRA layers"
    assert all(row.error is not None and row.error < 1e-5 for row in found)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt2(), tmp_path)
    pyfastlora.patch(again)
    tokens = torch.arange(12)[None].to(DEVICE)
    assert_close({"y": again(tokens).logits}, {"y": peft.eval()(tokens).logits})
    merged = [model.merge_and_unload() for model in (peft, ours)]
    assert_equal(merged[1].state_dict(), merged[0].state_dict())
    assert [type(m) for m in merged[1].modules()] == [type(m) for m in merged[0].modules()]


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    peft = adapted().eval()
    ours = patched_copy(peft)
    prompt = torch.arange(3, 8)[None].to(DEVICE)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(prompt, **options), peft.generate(prompt, **options))
    assert pyfastlora.report(ours)["wte"].calls_fused == 10


@pytest.mark.own_device
def test_a_block_compiles_in_one_graph() -> None:
    with DEVICE:
        peft = adapted(use_dora=True)
    ours = patched_copy(peft)
    mlp = ours.base_model.model.transformer.h[0].mlp
    x = torch.randn(2, 6, 64, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert_close({"y": compiled(x)}, {"y": mlp(x)})
    wte = ours.base_model.model.transformer.wte
    tokens = torch.arange(6, device=DEVICE)
    assert_close({"y": torch.compile(wte, backend="aot_eager", fullgraph=True)(tokens)}, {"y": wte(tokens)})
