"""What `bench.adapter_tax` times: a frozen dense base, PEFT's layers on it, and the same layers patched.

A case is a feature (what the adapter is), a config (the dtypes of base and adapter, autocast) and a number
of tokens, on one linear layer or on a small Llama. `linear` and `llama` make its three
forward-plus-backward callables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pyfastlora


@dataclass(frozen=True, slots=True)
class Feature:
    """What sits on the base layer."""

    dropout: float = 0.0
    dora: bool = False
    four_bit: bool = False


FEATURES = {
    "LoRA": Feature(),
    "dropout": Feature(dropout=0.1),
    "DoRA": Feature(dora=True),
    "QLoRA": Feature(four_bit=True),
    "QDoRA": Feature(dora=True, four_bit=True),
}


@dataclass(frozen=True, slots=True)
class Config:
    """Dtypes of the base (and of the activations) and of the adapter; whether autocast to bfloat16 is on."""

    base: torch.dtype
    adapter: torch.dtype
    autocast: bool = False

    def context(self, device: str = "cpu") -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext()


CONFIGS = {
    "fp32": Config(torch.float32, torch.float32),
    "bf16": Config(torch.bfloat16, torch.bfloat16),
    "bf16+fp32": Config(torch.bfloat16, torch.float32),
    "bf16+fp32 autocast": Config(torch.bfloat16, torch.float32, autocast=True),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The linear is width x width; the Llama has `layers` layers and takes `batch` x `length` tokens."""

    width: int = 2048
    rank: int = 16
    layers: int = 4
    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    vocabulary: int = 1024  # small: the head is no part of what is measured
    batch: int = 2
    length: int = 512


TINY = Sizes(64, 4, 2, 64, 128, 4, 64, 2, 8)


@dataclass(frozen=True, slots=True)
class Subject:
    """One case, ready to run: each callable does a forward and a backward pass and returns the output."""

    runs: dict[str, Callable[[], Tensor]]  # base, PEFT, ours
    patched: nn.Module

    def difference(self) -> float:
        """||ours - PEFT|| / ||PEFT|| of the outputs under one seed."""
        outputs = []
        for name in ("PEFT", "ours"):
            torch.manual_seed(0)
            outputs.append(self.runs[name]().double())
        return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())

    def fallback(self) -> str:
        """Why some calls ran PEFT's forward instead; "" when every call was fused."""
        reasons = {
            row.reason for row in pyfastlora.report(self.patched) if not row.fused or row.calls_fallback
        }
        return "; ".join(sorted(reasons))


def linear(feature: Feature, config: Config, tokens: int, sizes: Sizes) -> Subject:
    """One linear layer on the default device; x requires grad, so the backward pass gives dx and every
    adapter gradient.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(sizes.width, sizes.width, bias=False, dtype=config.base)).requires_grad_(
        False
    )
    x = torch.randn(tokens, sizes.width).to(config.base).requires_grad_()
    dy = torch.randn(tokens, sizes.width)

    def run_of(model: nn.Module, layer: nn.Module) -> Callable[[], Tensor]:
        with config.context(x.device.type):
            grad = dy.to(layer(x).dtype)

        def run() -> Tensor:
            with config.context(x.device.type):
                y: Tensor = layer(x)
            y.backward(grad)
            _drop_grads(model, x)
            return y.detach()

        return run

    peft = _adapted(base, ["0"], feature, config, sizes)
    ours = deepcopy(peft)
    pyfastlora.patch(ours)
    layer_of = [(base, base[0])] + [(model, model.base_model.model[0]) for model in (peft, ours)]
    runs = {name: run_of(*pair) for name, pair in zip(("base", "PEFT", "ours"), layer_of, strict=True)}
    return Subject(runs, ours)


def llama(feature: Feature, config: Config, tokens: int, sizes: Sizes) -> Subject:
    """Forward, loss and backward of a small Llama with adapters on all its linears.

    It is fed embeddings that require grad: so the base, too, sends its gradient through every layer.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        use_cache=False,
    )
    base = AutoModelForCausalLM.from_config(shape, dtype=config.base, attn_implementation="sdpa")
    base = base.requires_grad_(False).train()
    rows = tokens // sizes.length
    embeds = torch.randn(rows, sizes.length, sizes.hidden).to(config.base).requires_grad_()
    labels = torch.randint(sizes.vocabulary, (rows, sizes.length))

    def run_of(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with config.context():
                out = model(inputs_embeds=embeds, labels=labels)
            out.loss.backward()
            _drop_grads(model, embeds)
            logits: Tensor = out.logits.detach()
            return logits

        return run

    peft = _adapted(base, "all-linear", feature, config, sizes)
    ours = deepcopy(peft)
    pyfastlora.patch(ours)
    return Subject({"base": run_of(base), "PEFT": run_of(peft), "ours": run_of(ours)}, ours)


def _adapted(
    base: nn.Module, targets: list[str] | str, feature: Feature, config: Config, sizes: Sizes
) -> Any:
    """A PEFT model on a copy of `base`."""
    model = deepcopy(base)
    if feature.four_bit:
        quantise(model, config.base)
    return adapt(model, targets, feature, config.adapter, sizes.rank)


def adapt(model: nn.Module, targets: list[str] | str, feature: Feature, dtype: torch.dtype, rank: int) -> Any:
    """A PEFT model around `model`, in training mode, no factor zero and no magnitude the norm."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=feature.dropout,
        use_dora=feature.dora,
        target_modules=targets,
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return adapted.train()


def quantise(model: Any, compute: torch.dtype) -> None:
    """NF4 with double quantisation for every linear but the head, as transformers loads a model in 4 bits."""
    import bitsandbytes as bnb

    for name, linear in [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]:
        if name == "lm_head":
            continue
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",  # its own weight, which is replaced, would take seconds to draw
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64
        )
        model.set_submodule(name, layer.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT chooses its layer class by


def _drop_grads(model: nn.Module, x: Tensor) -> None:
    """As `zero_grad` between two steps, for both sides alike."""
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None
