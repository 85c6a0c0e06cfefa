"""The adapter, as PEFT's LoraConfig understands it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pyfastlora.trainer.config.values import Float, Int, Keys

INITS = ("gaussian", "pissa", "olora", "loftq", "orthogonal")
_REFUSED = {
    "eva": "looks at the data before training",
    "corda": "looks at the data before training",
    "mica": "freezes B",
    "lora_ga": "looks at gradients before training",
}


class AdapterKeys(Keys):
    """The adapter, as PEFT's LoraConfig understands it."""

    adapter: Literal["lora", "qlora", "relora"] | None = Field(
        None,
        description="lora: dense or 8-bit base; qlora: 4-bit base; relora: lora with relora: true; "
        "blank: the whole model is trained",
    )
    lora_model_dir: str | None = Field(
        None, description="the folder of an adapter to go on training; its own configuration holds"
    )
    lora_r: Int = Field(8, gt=0, description="rank of A and B")
    lora_alpha: Float = Field(8.0, gt=0, description="scaling is lora_alpha / lora_r")
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="probability, on the input of A")
    lora_target_modules: list[str] | str | None = Field(
        None, description="names of linear modules (ends of their full names), or one regular expression"
    )
    lora_target_linear: bool = Field(False, description="every linear module but the output head")
    lora_modules_to_save: list[str] = Field(
        [], description="modules trained whole and saved beside the adapter"
    )
    peft_layers_to_transform: Int | list[Int] | None = Field(
        None, description="numbers of the layers that get an adapter (default: all)"
    )
    peft_trainable_token_indices: Literal["new"] | list[Int] | dict[str, list[Int]] | None = Field(
        None, description="rows of the embeddings to train, by token; new: those of `tokens`"
    )
    peft_use_dora: bool = Field(False, description="DoRA: learn the magnitude of each output separately")
    peft_use_rslora: bool = Field(False, description="scaling is lora_alpha / sqrt(lora_r)")
    peft_init_lora_weights: bool | str = Field(
        True, description=f"true: A random, B zero; or {', '.join(INITS)}, pissa_niter_<n> (fast SVD)"
    )
    relora: bool = Field(
        False, description="ReLoRA: merge the adapter every relora_steps and begin another"
    )
    relora_steps: Int | None = Field(None, gt=0, description="steps between two merges")
    jagged_restart_steps: Int | None = Field(None, gt=0, description="ReLoRA: the same as relora_steps")
    relora_prune_ratio: Float = Field(
        0.9, ge=0, le=1, description="share of the optimizer's states, the smallest, set to 0 at a merge"
    )
    jagged_restart_warmup_steps: Int = Field(
        10, ge=0, description="ReLoRA: steps over which the learning rate comes back after a merge"
    )
    fastlora: bool = Field(True, description="false: PEFT's own forward, for comparison")

    @model_validator(mode="before")
    @classmethod
    def _relora_is_lora(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        asked = values.get("adapter") == "relora" or values.get("relora") or values.get("relora_steps")
        if asked:
            kind = "lora" if values.get("adapter") == "relora" else values.get("adapter")
            steps = values.get("relora_steps", values.get("jagged_restart_steps"))
            return values | {"adapter": kind, "relora": True, "relora_steps": steps}
        return values

    @field_validator("peft_init_lora_weights")
    @classmethod
    def _known_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, bool) or value in INITS or re.fullmatch(r"pissa_niter_\d+", value):
            return value
        if value in _REFUSED:
            raise ValueError(
                f"{value} {_REFUSED[value]}; make the adapter with PEFT, and give it as lora_model_dir"
            )
        raise ValueError(f"must be one of true, {', '.join(INITS)}, pissa_niter_<n>; got {value!r}")

    @property
    def init_of_base(self) -> str | None:
        """The start that is taken off the base, where there is one."""
        init = str(self.peft_init_lora_weights)
        return init if init.startswith(("pissa", "olora")) and self.lora_model_dir is None else None

    @property
    def changes_base(self) -> bool:
        """Whether the base is not as it was when the adapter is saved, which takes more rank then."""
        return self.relora or self.init_of_base is not None
