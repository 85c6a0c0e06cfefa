"""Batches, steps, optimizer and learning rate."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from pyfastlora.trainer.config.values import Float, Int, Keys, one_of

TORCH_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
BNB_OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
SCHEDULERS = (
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr"),
    *("polynomial", "inverse_sqrt", "warmup_stable_decay"),
)


class OptimisationKeys(Keys):
    """Batches, steps, optimizer and learning rate."""

    micro_batch_size: Int = Field(1, gt=0, description="samples per forward pass and device")
    gradient_accumulation_steps: Int = Field(
        1, gt=0, description="forward passes per step, averaged over tokens"
    )
    eval_batch_size: Int | None = Field(
        None, gt=0, description="samples per evaluation pass (micro_batch_size)"
    )
    num_epochs: Float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: Int | None = Field(None, gt=0, description="optimizer steps; instead of num_epochs")
    learning_rate: Float = Field(gt=0, description="peak learning rate")
    optimizer: str = Field("adamw_torch_fused", description="by transformers' name")
    lr_scheduler: str = Field("cosine", description="by transformers' name")
    lr_scheduler_kwargs: dict[str, Any] = Field({}, description="arguments of the scheduler")
    warmup_steps: Int | None = Field(None, ge=0, description="steps of linear warm-up")
    warmup_ratio: Float | None = Field(None, ge=0, lt=1, description="the same as a share of all steps")
    weight_decay: Float = Field(0.0, ge=0, description="of the optimizer")
    max_grad_norm: Float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_epsilon: Float = Field(1e-8, gt=0, description="added to the square root")
    neftune_noise_alpha: Float | None = Field(None, gt=0, description="noise on the input embeddings")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return one_of(
            value,
            TORCH_OPTIMIZERS + BNB_OPTIMIZERS,
            {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"},
        )

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return one_of(value, SCHEDULERS, {})
