"""Services that are told what log.jsonl is told, where asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pyfastlora.trainer.config.foreign import is_off
from pyfastlora.trainer.config.values import Keys


class LoggerKeys(Keys):
    """Services that are told what log.jsonl is told; none unless asked."""

    use_tensorboard: bool = Field(False, description="write event files to output_dir/tensorboard")
    use_wandb: bool | None = Field(
        None, description="tell Weights & Biases (default: where wandb_project is given)"
    )
    wandb_project: str | None = Field(None, description="its project")
    wandb_entity: str | None = Field(None, description="user or team that owns the project")
    wandb_name: str | None = Field(None, description="name of the run")
    wandb_run_id: str | None = Field(None, description="id of a run that is gone on with")
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="offline: files in output_dir/wandb, sent by `wandb sync`; disabled: nothing"
    )
    wandb_watch: Literal["gradients", "parameters", "all"] | None = Field(
        None, description="histograms that are sent too"
    )
    wandb_log_model: Literal["checkpoint", "end"] | None = Field(
        None, description="send adapters or models too: each checkpoint, or the last"
    )
    use_mlflow: bool | None = Field(None, description="tell MLflow (default: where an experiment is given)")
    mlflow_tracking_uri: str | None = Field(None, description="its server, or a database or folder")
    mlflow_experiment_name: str | None = Field(None, description="its experiment")
    mlflow_run_name: str | None = Field(None, description="name of the run")
    hf_mlflow_log_artifacts: bool = Field(False, description="send each checkpoint too")
    use_trackio: bool | None = Field(None, description="tell Trackio (default: where a project is given)")
    trackio_project_name: str | None = Field(None, description="its project")
    trackio_run_name: str | None = Field(None, description="name of the run")
    trackio_space_id: str | None = Field(
        None, description="a Space of the hub that it is sent to (default: none, it stays on the machine)"
    )

    @field_validator("wandb_mode", "wandb_watch", "wandb_log_model", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return None if is_off(value) else value

    @property
    def loggers(self) -> tuple[str, ...]:
        """Who is told, by transformers' names."""
        wandb = self.use_wandb if self.use_wandb is not None else bool(self.wandb_project)
        asked = {
            "tensorboard": self.use_tensorboard,
            "wandb": wandb and self.wandb_mode != "disabled",
            "mlflow": bool(self.mlflow_experiment_name) if self.use_mlflow is None else self.use_mlflow,
            "trackio": bool(self.trackio_project_name) if self.use_trackio is None else self.use_trackio,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def run_names(self) -> dict[str, str]:
        """The names that are given to the run, by their keys."""
        keys = ("wandb_name", "mlflow_run_name", "trackio_run_name")
        return {key: getattr(self, key) for key in keys if getattr(self, key)}
