"""`patch(model, loss=True)`: the loss and gradients of transformers, logits made when asked for, and reasons.

What could break: a factor or a cap that is lost, another loss than a model's own, a head that is adapted or
trained, generation, a class that does not come back.
"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from accuracy import DEVICE, error
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

import pyfastlora
from pyfastlora.fused import cross_entropy
from pyfastlora.patching.loss import Logits

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: What is done to the logits between head and loss: nothing; a factor; a cap; both ends tied.
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen2": {"tie_word_embeddings": True},
    "gpt_neox": {"num_key_value_heads": 4},
}
KINDS: dict[str, dict[str, Any]] = {
    "body": {"target_modules": ["o_proj", "dense"]},
    "adapted head": {"target_modules": ["o_proj", "dense", "lm_head", "embed_out"], "use_dora": True},
    "trained head": {"target_modules": ["o_proj", "dense"], "modules_to_save": ["lm_head", "embed_out"]},
}


def model_of(family: str, kind: str = "body", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, **KINDS[kind]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.to(DEVICE, dtype)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    return {"input_ids": ids, "labels": torch.where(ids % 4 == 0, -100, ids)}


def grads(model: Any, **given: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch(), **given).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_whole_logits(family, kind, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LEAST_TOKENS", 16)
    model = model_of(family, kind)
    exact = deepcopy(model).double()
    fused = deepcopy(model)
    report = pyfastlora.patch(fused, loss=True)
    assert len(report.loss) == 1
    for given in ({}, {"num_items_in_batch": torch.tensor(57, device=DEVICE)}):
        truth, theirs, ours = grads(exact, **given), grads(model, **given), grads(fused, **given)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # float32 on both sides: no more than a few last places apart
            assert error(value, truth[name]) <= 2 * error(theirs[name], truth[name]) + 2e-6, name
    assert "in chunks, 2 calls" in str(pyfastlora.report(fused)) and "whole logits" not in str(report)


def test_32_steps_of_training():
    model = model_of("gemma2", "adapted head")
    fused = deepcopy(model)
    pyfastlora.patch(fused, loss=True)
    curves = []
    for each in (model, fused):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for _ in range(32):
            losses.append(float(grads(each)["loss"]))
            optimizer.step()
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3) and curves[0][-1] < 0.9 * curves[0][0]


def test_logits_are_made_when_they_are_asked_for():
    model = model_of("gemma2")
    wanted = model(**batch()).logits
    pyfastlora.patch(model, loss=True)
    output = model(**batch())
    assert isinstance(output.logits, Logits)
    torch.testing.assert_close(output.logits.argmax(-1), wanted.argmax(-1))
    torch.testing.assert_close(output.logits.whole, wanted)
    torch.testing.assert_close(torch.softmax(output.logits, -1), torch.softmax(wanted, -1))
    torch.testing.assert_close(output.logits * 2, wanted * 2)
    torch.testing.assert_close(output.logits[:, -1], wanted[:, -1])


def test_trainer_under_autocast_makes_no_logits(monkeypatch, tmp_path):
    """accelerate casts outputs to float32, which is no reason to make some."""
    from accelerate.utils import convert_outputs_to_fp32

    model = model_of("gemma2")
    pyfastlora.patch(model, loss=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        whole = model(**batch()).logits.whole
    monkeypatch.setattr(Logits, "whole", property(lambda _: pytest.fail("logits were made")))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = convert_outputs_to_fp32(model)(**batch())
    assert isinstance(output.logits, Logits) and output.logits.dtype == torch.float32
    args = TrainingArguments(tmp_path, max_steps=2, bf16=True, use_cpu=DEVICE.type == "cpu", report_to="none")
    ids, labels = batch().values()
    rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(len(ids))]
    Trainer(model, args, train_dataset=rows).train()
    assert "in chunks" in pyfastlora.report(model).loss[0]
    assert "whole logits" not in pyfastlora.report(model).loss[0]
    monkeypatch.undo()
    assert whole.dtype == torch.bfloat16


def test_generation_and_calls_without_labels_are_as_they_were():
    model = model_of("llama").eval()
    ids = batch()["input_ids"][:1, :8]
    wanted = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    pyfastlora.patch(model, loss=True)
    assert model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).equal(wanted)
    assert isinstance(model(input_ids=ids).logits, torch.Tensor)


def test_the_head_is_back_after_an_error():
    model = model_of("llama")
    pyfastlora.patch(model, loss=True)
    with pytest.raises(ValueError, match="labels must be in"):
        model(input_ids=batch()["input_ids"], labels=batch()["input_ids"] + 200)
    assert isinstance(model.base_model.model.lm_head, torch.nn.Linear)


def test_its_class_is_its_own_again():
    model = model_of("llama")
    inner, kind = model.base_model.model, type(model.base_model.model)
    keys = list(model.state_dict())
    pyfastlora.patch(model, loss=True)
    assert isinstance(inner, kind) and type(inner).__name__ == kind.__name__ and type(inner) is not kind
    assert list(model.state_dict()) == keys
    for copied in (deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        assert float(grads(copied)["loss"]) == float(grads(model)["loss"])
    pyfastlora.unpatch(model)
    assert type(inner) is kind and isinstance(model(**batch()).logits, torch.Tensor)
    assert pyfastlora.report(model).loss == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "a forward hook"),
        (lambda m: setattr(m, "loss_function", lambda logits, **_: logits.sum()), "its loss is <lambda>"),
        (lambda m: setattr(m.config, "vocab_size", 64), "its head gives 128 logits, and vocab_size is 64"),
    ],
    ids=["hook", "another loss", "another vocabulary"],
)
def test_reasons(change, reason):
    model = model_of("llama")
    pyfastlora.patch(model, loss=True)
    change(model.base_model.model)
    given = batch()
    if "vocab_size" in reason:
        given["labels"] = given["labels"] % 64
        with pytest.raises((RuntimeError, ValueError)):  # as without the patch
            model(**given)
    else:
        model(**given)
    assert "whole logits, 1 calls: " in pyfastlora.report(model).loss[0]
    assert reason in pyfastlora.report(model).loss[0]


def test_a_model_that_computes_its_loss_by_itself():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 128}
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes))
    model = get_peft_model(base, LoraConfig(target_modules=["q"])).to(DEVICE).eval()
    wanted = model(**batch()).loss
    pyfastlora.patch(model, loss=True)
    assert model(**batch()).loss.equal(wanted)
    assert "its forward computes the loss by itself" in pyfastlora.report(model).loss[0]


def test_dropout_on_the_head_has_pefts_mask():
    model = model_of("llama")
    lora = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
    dropped = get_peft_model(model.unload(), lora).train()
    fused = deepcopy(dropped)
    pyfastlora.patch(fused, loss=True)
    found = []
    for each in (dropped, fused):
        torch.manual_seed(3)
        found.append(grads(each))
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"])
    assert "dropout on the head" in pyfastlora.report(fused).loss[0]


# A step of 8192 tokens over 128k words; the whole logits are 2 GiB in bfloat16, 4 in float32.
STEP = """
import resource, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import pyfastlora

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
config = LlamaConfig(vocab_size=128256, max_position_embeddings=8192, **sizes)
model = get_peft_model(LlamaForCausalLM(config).bfloat16(), LoraConfig(target_modules=["q_proj"]))
pyfastlora.patch(model, loss=sys.argv[1] == "ours")
ids = torch.arange(8192).reshape(1, -1)
model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()  # whatever is loaded and compiled first
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30),) * 2)
model(input_ids=ids, labels=ids).loss.backward()
print("passed")
"""


@pytest.mark.cpu_only("the limit is one of addresses")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_vocabulary_too_large_for_whole_logits():
    found = {}
    for loss in ("theirs", "ours"):
        done = subprocess.run([sys.executable, "-c", STEP, loss], capture_output=True, text=True)
        found[loss] = done.stdout.strip() or done.stderr
    assert "can't allocate memory" in found["theirs"] and found["ours"] == "passed", found
