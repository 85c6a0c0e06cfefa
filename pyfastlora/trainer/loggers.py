"""TensorBoard, Weights & Biases, MLflow and Trackio, through the callbacks that Trainer has for them.

They are given the records of log.jsonl, and none is loaded that is not asked for. What they read from the
environment is set for the time of a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError

#: What the callbacks and the packages themselves look up, by key.
_VARIABLES = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_run_id": "WANDB_RUN_ID",
    "wandb_mode": "WANDB_MODE",
    "wandb_watch": "WANDB_WATCH",
    "wandb_log_model": "WANDB_LOG_MODEL",
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "mlflow_experiment_name": "MLFLOW_EXPERIMENT_NAME",
    "hf_mlflow_log_artifacts": "HF_MLFLOW_LOG_ARTIFACTS",
}
#: What the packages would tell their makers, if nobody has said so already.
_NOTHING_ELSE = {
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False"},
}


def check_loggers(config: Config) -> None:
    """Raises UserError where the package of a logger is not installed, or does not load."""
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"use_{name}: {name} is not installed: pip install {name}")
        try:
            with told(config):  # what is read on import holds
                importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"use_{name}: {name} is installed and does not load: {error}; pip install --upgrade {name}"
            ) from error


def arguments(config: Config) -> dict[str, Any]:
    """Of TrainingArguments."""
    found: dict[str, Any] = {"report_to": list(config.loggers) or "none"}
    if names := config.run_names:
        found["run_name"] = next(iter(names.values()))
    if "trackio" in config.loggers:
        found["trackio_space_id"] = config.trackio_space_id
        if config.trackio_project_name:
            found["project"] = config.trackio_project_name
    return found


@contextmanager
def told(config: Config) -> Iterator[None]:
    """The environment for the time of a with block, and as it was afterwards."""
    wanted = _environment(config)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _environment(config: Config) -> dict[str, str]:
    out = Path(os.path.expanduser(config.output_dir)).absolute()
    # Trainer tells Kubeflow without being asked, where it finds itself there
    found = {"DISABLE_KUBEFLOW_INTEGRATION": "TRUE"}
    for key, variable in _VARIABLES.items():
        value = getattr(config, key)
        if value and key.removeprefix("hf_").partition("_")[0] in config.loggers:
            found[variable] = str(value).upper() if isinstance(value, bool) else value
    defaults = {}
    if "tensorboard" in config.loggers:
        found["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    if "wandb" in config.loggers:
        defaults["WANDB_DIR"] = str(out)
        if config.wandb_run_id:
            defaults["WANDB_RESUME"] = "allow"
    for name in config.loggers:
        defaults |= _NOTHING_ELSE.get(name, {})
    return found | {name: value for name, value in defaults.items() if name not in os.environ}
