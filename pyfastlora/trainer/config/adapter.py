"""The adapter, as PEFT's LoraConfig understands it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pyfastlora.trainer.config.values import Float, Int, Keys


class AdapterKeys(Keys):
    """The adapter, as PEFT's LoraConfig understands it."""

    adapter: Literal["lora", "qlora"] | None = Field(
        None, description="lora: dense or 8-bit base; qlora: 4-bit base; blank: the whole model is trained"
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
    peft_use_dora: bool = Field(False, description="DoRA: learn the magnitude of each output separately")
    peft_use_rslora: bool = Field(False, description="scaling is lora_alpha / sqrt(lora_r)")
    fastlora: bool = Field(True, description="false: PEFT's own forward, for comparison")
