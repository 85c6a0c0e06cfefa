"""Stand-ins for the models that PEFT's tests download: the same families, tiny and random.

They lie in the layout of the hub's own cache, where transformers and PEFT find them as they would find a
download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_GLU = {**_WIDTH, "intermediate_size": 64, "num_key_value_heads": 2}
_OPT = {
    **_WIDTH,
    "num_hidden_layers": 5,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
}  # five layers: tests count them
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = {**_WIDTH, "intermediate_size": 64}

#: id on the hub: (class, model type, sizes). Tests of any other id fail, with and without us.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "AutoModelForCausalLM",
        "gemma3_text",
        {**_GLU, "head_dim": 8, "sliding_window": 16},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _GLU),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("AutoModelForCausalLM", "mistral", _GLU),
    "hf-internal-testing/tiny-random-gpt2": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "peft-internal-testing/opt-125m": ("AutoModelForCausalLM", "opt", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-dummy-qwen2": ("AutoModelForCausalLM", "qwen2", _GLU),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModel", "bert", _BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "AutoModelForCausalLM",
        "bloom",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "AutoModelForCausalLM",
        "gptj",
        {**_GPT2, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("AutoModelForCausalLM", "gpt_neox", _BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _GLU),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("AutoModelForCausalLM", "opt", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "roberta",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-gpt2": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "AutoModelForCausalLM",
        "gpt_oss",
        {**_GLU, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "AutoModelForCausalLM",
        "llama4_text",
        {
            **_GLU,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
        },
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _GLU),
}
_VOCABULARY = 256  # the tests' own tokens are small numbers
_REVISION = "0" * 40


def fill(cache: Path) -> None:
    """Put every stand-in that is missing into a directory that HF_HUB_CACHE can name."""
    import torch
    import transformers

    for name, (loader, model_type, sizes) in MODELS.items():
        home = cache / f"models--{name.replace('/', '--')}"
        reference = home / "refs" / "main"
        if reference.exists():
            continue
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            model_type, vocab_size=_VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
        getattr(transformers, loader).from_config(config).save_pretrained(home / "snapshots" / _REVISION)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(_REVISION)
