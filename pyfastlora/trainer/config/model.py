"""The base model, its tokenizer and how its weights are held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pyfastlora.trainer.config.values import Keys


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


class ModelKeys(Keys):
    """The base model, its tokenizer and how its weights are held."""

    base_model: str = Field(description="a folder, or a model on the Hugging Face hub")
    revision_of_model: str | None = Field(None, description="hub: branch, tag or commit of base_model")
    tokenizer_config: str | None = Field(None, description="where the tokenizer is, if not with base_model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    special_tokens: SpecialTokens = Field(SpecialTokens(), description="roles to (re)assign")
    tokens: list[str] = Field([], description="tokens to add; their embeddings must be trained and saved")
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(None, description="attention of transformers (default: its own choice)")
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
