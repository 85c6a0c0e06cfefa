"""The learning rate over the steps, and of which parameters."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from pyfastlora.trainer.config.values import Float, Int, Keys, one_of

#: transformers' own, by its names.
OF_TRANSFORMERS = (
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
)
#: Ours (schedules.py), by Axolotl's names.
OF_OURS = ("one_cycle", "log_sweep", "rex")
SCHEDULERS = OF_TRANSFORMERS + OF_OURS


class LrGroupKeys(Keys):
    """An entry of lr_groups: parameters with a learning rate of their own."""

    name: str = Field(description="what the group is called in messages")
    modules: list[str] = Field(min_length=1, description="names of modules, or ends or middles of such names")
    lr: Float = Field(gt=0, description="peak learning rate of their trained parameters")


class ScheduleKeys(Keys):
    """The learning rate over the steps, and of which parameters."""

    learning_rate: Float = Field(gt=0, description="peak learning rate")
    lr_scheduler: str = Field("cosine", description="by transformers' name; or one_cycle, log_sweep, rex")
    lr_scheduler_kwargs: dict[str, Any] = Field({}, description="arguments of a scheduler of transformers")
    warmup_steps: Int | None = Field(None, ge=0, description="steps of linear warm-up")
    warmup_ratio: Float | None = Field(None, ge=0, lt=1, description="the same as a share of all steps")
    lr_quadratic_warmup: bool = Field(False, description="with cosine: warm-up by the square of its share")
    cosine_min_lr_ratio: Float | None = Field(
        None, ge=0, lt=1, description="with cosine: falls to this share of learning_rate, not to 0"
    )
    cosine_constant_lr_ratio: Float | None = Field(
        None, gt=0, lt=1, description="with cosine_min_lr_ratio: is there after this share of all steps"
    )
    lr_div_factor: Float | None = Field(
        None, gt=1, description="with one_cycle: it starts at learning_rate divided by this (25)"
    )
    log_sweep_min_lr: Float = Field(1e-10, gt=0, description="with log_sweep: the first learning rate")
    log_sweep_max_lr: Float = Field(10.0, gt=0, description="with log_sweep: the last learning rate")
    loraplus_lr_ratio: Float | None = Field(
        None, gt=0, description="LoRA+: B learns at learning_rate times this"
    )
    loraplus_lr_embedding: Float = Field(
        1e-6, gt=0, description="LoRA+: learning rate of adapters on embeddings"
    )
    embedding_lr: Float | None = Field(None, gt=0, description="of embeddings and head, where trained whole")
    embedding_lr_scale: Float | None = Field(None, gt=0, description="the same in units of learning_rate")
    lr_groups: list[LrGroupKeys] = Field([], description="learning rates of chosen modules")

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        return one_of(value, SCHEDULERS, {}, _REFUSED)


_REFUSED = {
    "reduce_lr_on_plateau": "follows evaluations, so that a run that goes on could not repeat it; "
    "say cosine, and early_stopping_patience",
    "greedy": "follows the loss of single steps, so that a run that goes on could not repeat it; say cosine",
}
