"""Every optimizer that is offered trains; parameters with rates of their own are in the right groups."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pyfastlora.trainer.config.optimisation import BNB_OPTIMIZERS, TORCH_OPTIMIZERS, TORCHAO_OPTIMIZERS
from pyfastlora.trainer.errors import ConfigError
from pyfastlora.trainer.optimizers import groups_of, with_arguments
from pyfastlora.trainer.training import FastloraTrainer

from .test_config import GOOD
from .test_resume import invoke, run


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        )
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    return get_peft_model(base, lora)


def rates(model, groups) -> dict[str, tuple[float, float]]:
    """(learning rate, decay) of each trained parameter; each is in one group."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in model.parameters())
    return dict(found)


def test_lora_plus_is_pefts(load, model):
    text = GOOD + "loraplus_lr_ratio: 8\nloraplus_lr_embedding: 3e-6\nweight_decay: 0.1\n"
    config = load(text).config
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=8, loraplus_lr_embedding=3e-6,
        loraplus_weight_decay=0.1,
    )  # fmt: skip
    decayed = [n for n, _ in model.named_parameters() if not n.endswith("bias")]
    ours = rates(model, groups_of(model, config, decayed))
    assert ours == rates(model, theirs.param_groups)
    assert {rate for rate, _ in ours.values()} == {config.learning_rate, config.learning_rate * 8, 3e-6}


def test_groups_by_name_and_the_embeddings(load, model):
    text = (
        "lr_groups:\n  - {name: first, modules: [layers.0, layers.9], lr: 5e-3}\n"
        "  - {name: q, modules: [q_proj], lr: 7e-3}\nembedding_lr_scale: 0.5\n"
    )
    config = load(GOOD + text).config
    found = rates(model, groups_of(model, config, ()))
    for name, (rate, _) in found.items():
        wanted = 5e-3 if "layers.0." in name else 7e-3 if "layers.1." in name else config.learning_rate
        assert rate == (config.learning_rate * 0.5 if "lm_head" in name else wanted), name
    nowhere = load(GOOD + "lr_groups:\n  - {name: none, modules: [k_proj], lr: 5e-3}\n").config
    with pytest.raises(ConfigError, match="no trained parameter is in the modules of none"):
        groups_of(model, nowhere, ())


def test_embeddings_that_nobody_trains(load):
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
    )
    plain = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="neither embeddings nor head are trained"):
        groups_of(plain, load(GOOD + "embedding_lr: 1e-5\n").config, ())


@pytest.mark.parametrize("optimizer", TORCH_OPTIMIZERS + TORCHAO_OPTIMIZERS + BNB_OPTIMIZERS)
def test_every_optimizer_learns(load, model, tmp_path, optimizer):
    if optimizer in TORCHAO_OPTIMIZERS:
        pytest.importorskip("torchao", reason="not among the test tools: torchao warns on import on a CPU")
    config = load(GOOD.replace("1e-4", "3e-3") + f"optimizer: {optimizer}\nloraplus_lr_ratio: 4\n").config
    args = TrainingArguments(
        output_dir=tmp_path, optim=optimizer, learning_rate=config.learning_rate, use_cpu=True
    )
    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    stepper = kind(groups_of(model, config, ()), **with_arguments(kind, arguments, config))
    tokens, losses = torch.arange(24).reshape(2, 12), []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        stepper.step()
        stepper.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_arguments_reach_the_optimizer(write_jsonl, alpaca_rows, config_file, tmp_path):
    data = write_jsonl(alpaca_rows)
    run(config_file(data, "optimizer: adafactor\n"))
    plain = load_file(tmp_path / "out" / "adapter_model.safetensors")
    other = config_file(data, "optimizer: adafactor\noptim_args: {scale_parameter: true}\n")
    run(other, "--output-dir", f"{tmp_path}/other")
    scaled = load_file(tmp_path / "other" / "adapter_model.safetensors")
    run(
        config_file(data, "optimizer: adafactor\noptim_args: scale_parameter=true\n"),
        *("--output-dir", f"{tmp_path}/text"),
    )
    unknown = invoke(config_file(data, "optim_args: {scale: 1}\n"), "--output-dir", f"{tmp_path}/unknown")
    assert unknown.exit_code == 2 and "optim_args: adamw_torch_fused has no argument scale" in unknown.stderr
    ours = invoke(config_file(data, "optim_args: {lr: 1}\n"), "--output-dir", f"{tmp_path}/ours")
    assert ours.exit_code == 2 and "optim_args: lr is the key learning_rate; say that" in ours.stderr
    text = load_file(tmp_path / "text" / "adapter_model.safetensors")
    assert all(t.equal(text[name]) for name, t in scaled.items())
    assert any(not t.equal(plain[name]) for name, t in scaled.items())


def test_embeddings_keep_32_bits_in_groups(load, model, tmp_path, monkeypatch):
    """As transformers has it for 8-bit optimizers without groups."""
    bnb = pytest.importorskip("bitsandbytes")
    manager, kept = bnb.optim.GlobalOptimManager.get_instance(), []
    monkeypatch.setattr(manager, "register_module_override", lambda module, *_: kept.append(module))
    config = load(GOOD + "optimizer: adamw_bnb_8bit\nloraplus_lr_ratio: 4\n").config
    args = TrainingArguments(output_dir=tmp_path, optim="adamw_bnb_8bit", use_cpu=True)
    trainer = object.__new__(FastloraTrainer)
    trainer.model, trainer.args, trainer.config = model, args, config
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {1e-4, 4e-4, 1e-6}
    assert any(isinstance(module, torch.nn.Embedding) for module in kept)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim_args: {betas: 3}\n", "optim_args: adamw_torch_fused cannot be made: "),
        ("lr_groups:\n  - {name: none, modules: [nowhere], lr: 5e-3}\n", "in the modules of none"),
        ("embedding_lr: 1e-5\n", "neither embeddings nor head are trained"),
        ("lr_scheduler_kwargs: {min: 1}\n", "lr_scheduler_kwargs: polynomial cannot be made: "),
        ("torch_compile: true\ntorch_compile_backend: inductoor\n", "torch_compile_backend: must be one of"),
        ("peft_layers_to_transform: [7]\n", "adapter: PEFT cannot make it: "),
        ("peft_trainable_token_indices: [9999]\n", "the embeddings have 384 rows; got 9999"),
        ("peft_init_lora_weights: orthogonal\n", "adapter: PEFT cannot make it: "),
    ],
)
def test_what_cannot_be_is_told_before_a_run_begins(
    write_jsonl, alpaca_rows, config_file, tmp_path, text, sentence
):
    config = config_file(write_jsonl(alpaca_rows), text)
    if "lr_scheduler" in text:
        config.write_text(config.read_text().replace("constant", "polynomial"))
    if "orthogonal" in text:
        config.write_text(config.read_text().replace("lora_r: 8", "lora_r: 7"))
    result = invoke(config)
    assert result.exit_code in (1, 2) and sentence in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optimizer: adamw_hf\n", "optimizer: 'adamw_hf' no longer exists; adamw_torch takes its place"),
        ("optimizer: adamw_anyprecision\n", "torchdistx is no longer maintained"),
        ("optimizer: galore_adamw\n", "those of an adapter are"),
        ("optimizer: adamw_torch_xla\n", "is for TPUs"),
        ("optim_args: [1]\n", "optim_args must be a mapping, or text like name=value, name=value; got"),
        ("embedding_lr: 1e-5\nembedding_lr_scale: 2\n", "say the same in two ways"),
        ("loraplus_lr_embedding: 1e-5\n", "loraplus_lr_embedding goes with loraplus_lr_ratio"),
    ],
)
def test_keys_that_do_not_fit(mistakes, text, sentence):
    assert sentence in "\n".join(mistakes(GOOD + text))
