"""The base model, its tokenizer and how its weights are held."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pyfastlora.trainer.config.values import Int, Keys, one_of

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_SHORT = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa", "xformers": "sdpa"}
_NO_ATTENTION = {
    "sage": "has no backward pass; say sdpa",
    "fp8": "is attention in 8 bits, which a model is not trained with; say sdpa",
    "s2": "changes what a token sees between layers and is gone from Axolotl; say sdpa",
}


class SpecialTokens(Keys):
    """special_tokens: the roles to (re)assign, each to one token."""

    bos_token: str | None = Field(default=None, description="opens a text")
    eos_token: str | None = Field(default=None, description="ends a response")
    pad_token: str | None = Field(default=None, description="fills a batch up")
    unk_token: str | None = Field(default=None, description="stands for what has no token")


class BnbKeys(Keys):
    """bnb_config_kwargs: how bitsandbytes stores the 4-bit base."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="the 16 values a weight can have"
    )
    bnb_4bit_use_double_quant: bool = Field(default=True, description="the scales in 8 bits too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of matrix products (default: that of the base)"
    )
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        default="uint8", description="dtype of the tensor that holds the packed weights"
    )


class CheckpointingKeys(Keys):
    """gradient_checkpointing_kwargs."""

    use_reentrant: bool = Field(default=False, description="torch's older kind of checkpointing")
    every_n_layers: Int = Field(default=1, gt=0, description="recompute every n-th layer, keep the others")


class ModelKeys(Keys):
    """The base model, its tokenizer and how its weights are held."""

    base_model: str = Field(description="a folder, or a model on the Hugging Face hub")
    revision_of_model: str | None = Field(None, description="hub: branch, tag or commit of base_model")
    tokenizer_config: str | None = Field(None, description="where the tokenizer is, if not with base_model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    special_tokens: SpecialTokens = Field(SpecialTokens(), description="roles to (re)assign")
    tokens: list[str] = Field([], description="tokens to add; their embeddings must be trained and saved")
    attn_implementation: str | None = Field(
        None, description=f"attention of transformers: {', '.join(ATTENTIONS)} (default: its own choice)"
    )
    overrides_of_model_config: dict[str, Any] = Field(
        {}, description="values of the model's config.json to replace, mappings key by key"
    )
    resize_token_embeddings_to_32x: bool = Field(
        False, description="rows of the embeddings up to a multiple of 32"
    )
    load_in_4bit: bool | None = Field(None, description="bitsandbytes 4-bit base; implied by adapter: qlora")
    load_in_8bit: bool = Field(False, description="bitsandbytes 8-bit base (LLM.int8), with adapter: lora")
    bnb_config_kwargs: BnbKeys = Field(BnbKeys(), description="details of the 4-bit base")
    bf16: bool | Literal["auto", "full"] = Field(
        "auto", description="true: bf16 base, fp32 adapter, autocast; full: all bf16; auto: true where fast"
    )
    fp16: bool = Field(False, description="the same with float16; needs a GPU")
    tf32: bool | Literal["auto"] = Field(
        "auto", description="TensorFloat-32 for fp32 matrix products on a GPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    gradient_checkpointing_kwargs: CheckpointingKeys = Field(
        CheckpointingKeys(), description="how it is done"
    )

    @field_validator("attn_implementation")
    @classmethod
    def _known_attention(cls, value: str | None) -> str | None:
        return None if value is None else one_of(value, ATTENTIONS, _SHORT, _NO_ATTENTION)
