"""Batches, steps and the optimizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pyfastlora.trainer.config.values import Float, Int, Keys, one_of

TORCH_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
TORCHAO_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
BNB_OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
_GONE = {
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_anyprecision": "adamw_torch_8bit, as torchdistx is no longer maintained,",
}
_OWN_STEP = "takes its step within the backward pass, which knows no accumulation, clipping or checkpoints"
_FULL_RANK = "makes gradients of whole matrices low in rank; those of an adapter are"
_NO_SCHEDULE = "averages weights in place of a schedule, and is evaluated in a mode that Trainer has not"
_REFUSED = {
    "adamw_torch_xla": "is for TPUs, which torch_xla drives; say adamw_torch_fused",
    "adamw_torch_npu_fused": "is for Ascend's NPUs; say adamw_torch_fused",
    "lomo": f"{_OWN_STEP}; say adamw_8bit",
    "adalomo": f"{_OWN_STEP}; say adamw_8bit",
    **dict.fromkeys(
        (
            *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
            *("apollo_adamw", "apollo_adamw_layerwise"),
        ),
        f"{_FULL_RANK}; say adamw_8bit",
    ),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        f"{_NO_SCHEDULE}; say adamw_torch_fused",
    ),
    "grokadamw": "is an experiment whose package is no longer released; say adamw_torch_fused",
    "stable_adamw": "comes with torch-optimi, which is not among the packages tested; say adamw_torch_fused",
}


class OptimisationKeys(Keys):
    """Batches, steps and the optimizer."""

    micro_batch_size: Int = Field(1, gt=0, description="samples per forward pass and device")
    gradient_accumulation_steps: Int = Field(
        1, gt=0, description="forward passes per step, averaged over tokens"
    )
    eval_batch_size: Int | None = Field(
        None, gt=0, description="samples per evaluation pass (micro_batch_size)"
    )
    num_epochs: Float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: Int | None = Field(None, gt=0, description="optimizer steps; instead of num_epochs")
    early_stopping_patience: Int | None = Field(
        None, gt=0, description="stop after so many evaluations in a row without a lower held-out loss"
    )
    optimizer: str = Field("adamw_torch_fused", description="by transformers' name")
    optim_args: dict[str, Any] | str | None = Field(
        None, description="further arguments of the optimizer, as a mapping or as name=value, name=value"
    )
    weight_decay: Float = Field(0.0, ge=0, description="of the optimizer")
    max_grad_norm: Float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    adam_epsilon: Float = Field(1e-8, gt=0, description="added to the square root")
    neftune_noise_alpha: Float | None = Field(None, gt=0, description="noise on the input embeddings")
    torch_compile: bool | Literal["auto"] = Field(
        False, description="compile the model's forward and backward; auto: on a GPU"
    )
    torch_compile_backend: str | None = Field(None, description="of torch.compile (inductor)")
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = Field(
        None, description="of torch.compile (default)"
    )

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return one_of(value, TORCH_OPTIMIZERS + TORCHAO_OPTIMIZERS + BNB_OPTIMIZERS, _GONE, _REFUSED)

    @field_validator("optim_args")
    @classmethod
    def _named_values(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if isinstance(value, str) and not all(part.count("=") == 1 for part in value.split(",")):
            raise ValueError(f"must be name=value, name=value or a mapping; got {value!r}")
        return value
