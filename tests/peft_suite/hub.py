"""Stand-ins for the models that PEFT's tests download: the same families, tiny and random.

They lie in the layout of the hub's own cache, where transformers and PEFT find them as they would find a
download.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_GLU = {**_WIDTH, "intermediate_size": 64, "num_key_value_heads": 2}
_WIDE = {**_GLU, "hidden_size": 64}  # tests give the keys and values a rank of 20
_OPT = {
    **_WIDTH,
    "hidden_size": 16,  # tests expect rank 8 to be half of everything
    "num_hidden_layers": 5,  # tests count them
    "ffn_dim": 64,
    "word_embed_proj_dim": 16,
}
_OPT_125M = {**_OPT, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 12}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = {**_WIDTH, "intermediate_size": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 128}
_BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
_BART |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
_CLASSIFIER, _SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"

#: id on the hub: (class, model type, sizes). Tests of any other id fail, with and without us.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-uncased": ("AutoModel", "bert", _BERT),
    "gpt2": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "hf-internal-testing/Mixtral-tiny": (
        "AutoModelForCausalLM",
        "mixtral",
        {**_GLU, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "AutoModelForCausalLM",
        "gemma3_text",
        {**_GLU, "head_dim": 8, "sliding_window": 16},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _GLU),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("AutoModelForCausalLM", "mistral", _GLU),
    "hf-internal-testing/tiny-random-gpt2": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "peft-internal-testing/opt-125m": ("AutoModelForCausalLM", "opt", _OPT_125M),
    "peft-internal-testing/tiny-clip-text-2": ("AutoModel", "clip_text_model", _BERT),
    "peft-internal-testing/tiny-dummy-qwen2": ("AutoModelForCausalLM", "qwen2", _GLU),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (_SEQ2SEQ, "bart", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (_CLASSIFIER, "bert", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModel", "bert", _BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "AutoModelForCausalLM",
        "bloom",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("AutoModel", "deberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("AutoModel", "deberta-v2", _BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "AutoModelForCausalLM",
        "gptj",
        {**_GPT2, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("AutoModelForCausalLM", "gpt_neox", _BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _GLU),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("AutoModelForCausalLM", "opt", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (_CLASSIFIER, "roberta", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("AutoModel", "roberta", _BERT),
    **{
        f"peft-internal-testing/tiny-random-{name}": (_SEQ2SEQ, "t5", _T5)
        for name in ("T5ForConditionalGeneration", "T5ForConditionalGeneration-calibrated", "t5")
    },
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
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (_CLASSIFIER, "llama", _GLU),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "AutoModelForCausalLM",
        "qwen3_moe",
        {**_GLU, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("AutoModelForCausalLM", "qwen3", {**_GLU, "head_dim": 8}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", _WIDE),
}
_VOCABULARY = 264  # bytes, and the special tokens; the tests' own tokens are small numbers
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def fill(cache: Path) -> None:
    """Put every stand-in that is missing, or another than now, where HF_HUB_CACHE can name it."""
    import torch
    import transformers

    tokenizer = _tokenizer()
    for name, (loader, model_type, sizes) in MODELS.items():
        revision = hashlib.sha1(json.dumps([loader, model_type, sizes, _VOCABULARY]).encode()).hexdigest()
        home = cache / f"models--{name.replace('/', '--')}"
        reference = home / "refs" / "main"
        if reference.exists() and reference.read_text() == revision:
            continue
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            model_type, vocab_size=_VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
        files = home / "snapshots" / revision
        getattr(transformers, loader).from_config(config).save_pretrained(files)
        tokenizer.save_pretrained(files)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(revision)


def _tokenizer() -> Any:
    """A token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL.values(), *bytes_])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_SPECIAL["unk_token"]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **_SPECIAL)
