"""What each of several processes holds of model and optimizer: presets by name, and DeepSpeed's own files.

single          one process
ddp             every process holds everything; gradients are averaged
zero1, 2        DeepSpeed: optimizer states are divided; with 2, gradients too
zero3           DeepSpeed: weights are divided as well; zero3_offload keeps them in CPU memory
fsdp2           torch's fully_shard: weights, gradients and states are divided; fsdp2_offload likewise
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.engine import STRATEGIES
from pyfastlora.trainer.errors import ConfigError, UserError
from pyfastlora.trainer.processes import Processes

#: Values of the buffer that DeepSpeed collects gradients in, allocated however few there are; its own default
#: takes 1.9 GiB in float32, for an adapter that has some ten million values.
BUCKET = 50_000_000
_DEFAULT_BUCKET = 500_000_000


@dataclass(frozen=True)
class Strategy:
    """What is in effect. deepspeed: DeepSpeed's configuration, where that is what divides."""

    name: str
    processes: int
    deepspeed: dict[str, Any] | None = None

    @property
    def is_fsdp2(self) -> bool:
        """Whether fully_shard divides the model."""
        return self.name.startswith("fsdp2")

    @property
    def offloads(self) -> bool:
        """Whether shards rest in CPU memory."""
        return self.name.endswith("offload")

    @property
    def divides_weights(self) -> bool:
        """Whether no process holds a whole model."""
        return self.is_fsdp2 or (self.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3

    def __str__(self) -> str:
        """ "zero2, 2 processes"."""
        return self.name if self.processes == 1 else f"{self.name}, {self.processes} processes"


def resolve(config: Config, processes: Processes, device: str) -> Strategy:
    """The strategy of a run. Raises UserError where DeepSpeed is not installed or its file is not usable."""
    name = config.strategy
    if name is None and config.deepspeed is None:
        return Strategy("single" if processes.count == 1 else "ddp", processes.count)
    if name is None or name.startswith("zero"):
        found = _deepspeed(name if name is not None else config.deepspeed, config, device)
        _prepare_deepspeed(device)
        stage = found["zero_optimization"]["stage"]
        return Strategy(name or _name(stage, found), processes.count, found)
    if name.startswith("fsdp2") and config.fsdp_config.offload_params:
        name = "fsdp2_offload"
    return Strategy("single" if name == "ddp" and processes.count == 1 else name, processes.count)


def bucket_of(config: Config) -> int:
    """Values of DeepSpeed's buffer for gradients: a preset's, a file's own, or DeepSpeed's default."""
    given = config.strategy or config.deepspeed
    if isinstance(given, str) and given in STRATEGIES:
        return BUCKET
    settings = _read(given) if isinstance(given, str) else given or {}
    size = settings.get("zero_optimization", {}).get("reduce_bucket_size", "auto")
    return _DEFAULT_BUCKET if size == "auto" else int(size)


def needs_process_group(config: Config) -> bool:
    """Whether even one process has to be started as one of a group."""
    return config.deepspeed is not None or (config.strategy or "ddp") != "ddp"


def _deepspeed(given: Any, config: Config, device: str) -> dict[str, Any]:
    if isinstance(given, str) and given in STRATEGIES:
        settings: dict[str, Any] = {"zero_optimization": _zero(given, device)}
    else:
        settings = _read(given) if isinstance(given, str) else json.loads(json.dumps(given))
    if not isinstance(settings.get("zero_optimization", {}), dict):
        raise ConfigError("deepspeed: zero_optimization must be a mapping with a stage")
    settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if given_by_us := sorted({"optimizer", "scheduler"} & settings.keys()):
        raise ConfigError(
            f"deepspeed: {' and '.join(given_by_us)} come from the YAML (optimizer, lr_scheduler); "
            "remove them from the DeepSpeed configuration"
        )
    # our own: autocast as without DeepSpeed, which else would train 16-bit copies of the adapter
    for dtype in ("bf16", "fp16"):
        settings[dtype] = {"enabled": False}
    ours = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f"deepspeed: {key} is {settings[key]}, the YAML has {value}; write auto there")
        settings[key] = value
    settings.pop("train_batch_size", None)  # their product
    return settings | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _zero(name: str, device: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "stage": int(name.removeprefix("zero")[0]),
        "overlap_comm": device != "cpu",
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if name.endswith("offload"):
        there = {"device": "cpu", "pin_memory": device != "cpu"}
        settings |= {"offload_param": there, "offload_optimizer": there}
    return settings


def _read(path: str) -> dict[str, Any]:
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        presets = ", ".join(s for s in STRATEGIES if s.startswith("zero"))
        raise ConfigError(f"deepspeed: {path}: no such file; give one, or a preset as strategy ({presets})")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"deepspeed: {path} holds no mapping")
    return settings


def _name(stage: int, settings: dict[str, Any]) -> str:
    offloads = any(key.startswith("offload") for key in settings["zero_optimization"])
    return f"zero{stage}" + ("_offload" if offloads else "")


def _prepare_deepspeed(device: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            'strategy: DeepSpeed is not installed: DS_BUILD_OPS=0 pip install "pyfastlora[deepspeed]"'
        )
    if device == "cpu":
        import deepspeed

        # sums over shared memory, compiled for a minute on first use: gloo does them too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
