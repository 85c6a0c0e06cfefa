"""Where the run goes, what it reports and how often."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pyfastlora.trainer.config.values import Float, Int, Keys


class RunKeys(Keys):
    """Where the run goes, what it reports and how often."""

    output_dir: str = Field("./model-out", min_length=1, description="a new or empty folder")
    base_config: str | None = Field(
        None, description="another file, read first: this one replaces what it says, mappings key by key"
    )
    seed: Int = Field(42, ge=0, description="of adapter, data order and dropout")
    logging_steps: Int = Field(1, gt=0, description="steps between two lines of log.jsonl")
    report_samples: Int = Field(
        3, ge=0, description="held-out prompts that are answered before and after, for report.html"
    )
    eval_strategy: Literal["no", "epoch", "steps"] | None = Field(None, description="default: epoch")
    eval_steps: Int | None = Field(None, gt=0, description="steps between two evaluations")
    evals_per_epoch: Int | None = Field(None, gt=0, description="the same as a count")
    eval_on_start: bool = Field(False, description="evaluate before the first step too")
    save_strategy: Literal["no", "epoch", "steps", "best"] | None = Field(
        None, description="default: epoch; best: whenever the held-out loss is lower than ever"
    )
    save_steps: Int | None = Field(None, gt=0, description="steps between two checkpoints")
    saves_per_epoch: Int | None = Field(None, gt=0, description="the same as a count")
    save_total_limit: Int | None = Field(
        None, gt=0, description="checkpoints kept: the newest, and the one with the lowest held-out loss"
    )
    load_best_model_at_end: bool = Field(
        False, description="the result is the checkpoint with the lowest held-out loss, not the last step"
    )
    loss_watchdog_threshold: Float | None = Field(
        None, gt=0, description="a loss above it is logged as a spike (default: twice the median of 50)"
    )
    loss_watchdog_patience: Int = Field(
        3, gt=0, description="so many losses above the threshold in a row stop the run"
    )
    resume_from_checkpoint: str | None = Field(
        None, description="go on from this checkpoint; `auto` is the newest in output_dir (--resume)"
    )
    auto_resume_from_checkpoints: bool = Field(False, description="the same as resume_from_checkpoint: auto")
    strict: bool = Field(True, description="false: an unknown key is a warning, not an error")
