"""Going on with a run that was stopped: from which checkpoint, and whether it would still be the same run.

A checkpoint carries a fingerprint of all that decides its numbers: the keys of the configuration, the content
of data and base model, versions and processes. Where one has changed, what would go on is another run, and it
is refused with the change named.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from pyfastlora.trainer.checkpoints import checkpoints, step_of
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.loggers import LoggerKeys
from pyfastlora.trainer.errors import ConfigError

STATE = "fastlora.json"  # beside transformers' trainer_state.json
_PACKAGES = (
    *("pyfastlora", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "deepspeed"),
)
#: Keys that leave the numbers alone. Where data and model are is no matter: their content is hashed.
_NO_MATTER = {
    *LoggerKeys.model_fields,
    *("output_dir", "base_config", "strict", "logging_steps", "report_samples", "save_strategy"),
    *("save_steps", "saves_per_epoch", "save_total_limit", "resume_from_checkpoint"),
    "auto_resume_from_checkpoints",
    *("dataset_prepared_path", "datasets", "test_datasets", "base_model"),
    *("lora_model_dir", "early_stopping_patience", "loss_watchdog_threshold", "loss_watchdog_patience"),
    *("ddp_timeout", "ddp_bucket_cap_mb", "dataloader_num_workers", "trust_remote_code"),
}
#: Of a dataset, the keys that say how often or which of its rows are seen; its name stands for the others.
_OF_DATASETS = {"weight", "shards", "shards_idx"}
_HEAD = 1 << 20  # bytes of a weight file that are hashed, its size beside them: it may have gigabytes


def find(run_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from; None to begin. wanted: `auto` (the newest, if any), `never`, or a folder.

    Raises ConfigError for a folder that is no checkpoint of ours, and for one that is not the newest of its
    run: what lies behind it would be overwritten.
    """
    there = checkpoints(run_dir)
    if wanted == "never":
        return None
    if wanted == "auto":
        return there[-1] if there else None
    chosen = Path(os.path.expanduser(wanted))
    if not (chosen / STATE).is_file():
        known = f"; {run_dir} holds {', '.join(c.name for c in there)}" if there else ""
        raise ConfigError(f"--resume: {chosen} is no checkpoint of fastlora train{known}")
    inside = chosen.resolve().parent == run_dir.resolve()
    if inside and step_of(there[-1]) > step_of(chosen):
        raise ConfigError(
            f"--resume: {chosen.name} is followed by {there[-1].name}, which would be overwritten; "
            "choose another output_dir, or remove what comes after"
        )
    return chosen


def fingerprint(config: Config, contents: dict[str, str], strategy: str, processes: int, device: str) -> Any:
    """What decides the numbers of a run, in sections. contents: a hash for each part of the data."""
    keys = config.model_dump(mode="json", exclude=_NO_MATTER)
    for section in ("datasets", "test_datasets"):
        for i, entry in enumerate(getattr(config, section)):
            keys |= {f"{section}[{i}].{key}": getattr(entry, key) for key in sorted(_OF_DATASETS)}
    return {
        "config": keys,
        "data": contents,
        "base_model": _of_model(config),
        "versions": {name: _version(name) for name in _PACKAGES},
        "machine": {"processes": processes, "strategy": strategy, "device": device},
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What has changed, a line each: "learning_rate was 0.0002 and is 0.0001"."""
    found = []
    for section in new:
        before, now = old.get(section, {}), new[section]
        for key in sorted(before.keys() | now.keys()):
            was, is_ = before.get(key), now.get(key)
            if was != is_:
                hashed = section in ("data", "base_model") and was and is_
                found.append(f"{key} has other content" if hashed else f"{key} was {was} and is {is_}")
    return found


def check(checkpoint: Path, new: dict[str, Any], anyway: bool) -> list[str]:
    """The changes since the checkpoint was written. Raises ConfigError for any unless `anyway`."""
    changes = differences(read_state(checkpoint)["fingerprint"], new)
    if changes and not anyway:
        raise ConfigError(
            f"--resume: {checkpoint} is of another run: {'; '.join(changes)}. Put it back, or accept with "
            "--resume-anyway that the curve changes there"
        )
    return changes


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Of a checkpoint: fingerprint, and what was counted since the last logged step."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def _of_model(config: Config) -> dict[str, str]:
    found = {"base_model": _of_folder(config.base_model, config.revision_of_model)}
    if config.lora_model_dir is not None:
        found["lora_model_dir"] = _of_folder(config.lora_model_dir)
    return found


def _of_folder(name: str, revision: str | None = None) -> str:
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return f"{name} {revision or ''}".strip()
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(_HEAD))
    return digest.hexdigest()[:24]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
