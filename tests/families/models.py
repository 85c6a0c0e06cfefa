"""Tiny random models of the families in transformers, with LoRA on everything that can carry it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from patching.models import with_noise
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY, TOKENS = 128, 12

_WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
_PLAIN = {**_WIDTH, "intermediate_size": 128}
_GLU = {**_PLAIN, "num_key_value_heads": 2}
_HEADS = {**_GLU, "head_dim": 16}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True, eq=False)
class Family:
    """A family: its `model_type` in transformers, sizes, its experts' parameters and what it never calls."""

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    loader: str = "AutoModelForCausalLM"
    uncalled: tuple[str, ...] = ()  # whose weights it reads by itself

    def __str__(self) -> str:
        return self.model_type

    def build(self) -> nn.Module:
        """The model with random weights in float32."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self._sizes())
        return getattr(transformers, self.loader).from_config(config, attn_implementation="eager")

    def _sizes(self) -> dict[str, Any]:
        tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self.sizes if self.model_type == "llava" else {**tokens, **self.sizes}

    def inputs(self) -> dict[str, Tensor]:
        """One batch, the same each time: ids that are their own labels, and images for those that see."""
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randint(3, VOCABULARY - 1, (2, TOKENS), generator=generator)
        labels = tokens.clone()
        batch = {"input_ids": tokens, "labels": labels}
        if self.model_type == "llava":
            tokens[:, 1:5] = _IMAGE
            labels[:, 1:5] = -100
            batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
            batch["attention_mask"] = torch.ones_like(tokens)
        return batch


_IMAGE = VOCABULARY - 1  # the token in whose place a patch of an image goes
_VISION = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}

FAMILIES = [
    Family("llama", _GLU),
    Family("mistral", {**_GLU, "sliding_window": 8}),
    Family("qwen2", _GLU),
    Family("qwen3", _HEADS),
    Family("gemma", _HEADS),
    Family("gemma2", {**_HEADS, "sliding_window": 8}),
    Family("gemma3_text", {**_HEADS, "sliding_window": 8}),
    Family(
        "gemma3n_text",
        {
            **_HEADS,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,  # the last layer takes keys and values of the one before
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],  # in the first layer
            "laurel_rank": 8,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        uncalled=("correction_coefs",),
    ),
    Family("phi3", _GLU),
    Family("glm4", _HEADS),
    Family("granite", _GLU),
    Family("olmo2", _GLU),
    Family("cohere2", {**_GLU, "sliding_window": 8, "logit_scale": 1.0}),
    Family("falcon", {**_WIDTH, "ffn_hidden_size": 128}),
    Family("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 32}),
    Family("gpt_neox", _PLAIN),
    Family("gptj", {**_GPT2, "rotary_dim": 8}),
    Family("gpt2", _GPT2),
    Family("opt", {**_WIDTH, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    Family("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    Family("starcoder2", _GLU),
    Family("stablelm", _GLU),
    Family(
        "mixtral", {**_GLU, "num_local_experts": 4, "num_experts_per_tok": 2}, ("gate_up_proj", "down_proj")
    ),
    Family("qwen3_moe", {**_HEADS, **_EXPERTS, "num_experts": 4}, ("gate_up_proj", "down_proj")),
    Family(
        "deepseek_v3",
        {
            **_PLAIN,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        ("gate_up_proj", "down_proj"),
    ),
    Family(
        "llama4_text",
        {
            **_HEADS,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        ("gate_up_proj", "down_proj"),
    ),
    Family(
        "gpt_oss",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        ("gate_up_proj", "down_proj"),
    ),
    Family(
        "t5",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        },
        loader="AutoModelForSeq2SeqLM",
        uncalled=("shared",),  # its stacks hold the embedding beneath the adapter
    ),
    Family(
        "llava",
        {
            "text_config": {"model_type": "llama", "vocab_size": VOCABULARY, "pad_token_id": 0, **_GLU},
            "vision_config": {**_PLAIN, **_VISION},
            "image_token_id": _IMAGE,
        },
        loader="AutoModelForImageTextToText",
    ),
]


def adapted(family: Family, **config: Any) -> nn.Module:
    """LoRA on every linear but the head, on the input embedding, on the experts' parameters; no B is zero."""
    model = family.build()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if module is embedding or (_is_linear(module) and module is not head)
    ]
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "fan_in_fan_out": family.model_type == "gpt2",
        "target_parameters": [f"experts.{name}" for name in family.experts] or None,
    }
    return with_noise(get_peft_model(model, LoraConfig(**{**settings, **config})), 0.05)


def _is_linear(module: nn.Module) -> bool:
    """Not a router: Llama 4's returns a pair, which PEFT's layer cannot add to."""
    return isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__
