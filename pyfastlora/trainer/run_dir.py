"""The run directory: what was asked, on what machine, what happened, and the adapter.

config.original.yaml   the file as the user wrote it
config.resolved.yaml   every key with the value it had; `fastlora train` runs it again
env.json               versions, machine, command line
data.json              rows, samples, tokens per dataset
plan.json              the memory that was planned, and the most that was taken
strategy.json          what each process held, and DeepSpeed's configuration
kernels.json, .txt     which modules were fused, and why the others were not
log.jsonl              one JSON object per event: start, train, eval, spike, resume, end
samples.json           held-out prompts, and what the model answered before and after
report.html            all of this as one page; `fastlora report` makes it again
tensorboard/, wandb/   what these loggers wrote, where a key asks for them
checkpoint-N/          adapter, optimizer, schedule and random state after N steps; see checkpoints.py
README.md              a card of adapter or model, with the facts of the run
adapter_*              the adapter in PEFT's format (without one: model.safetensors), the tokenizer beside it
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.errors import ConfigError

_PACKAGES = (
    *("pyfastlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"),
    *("tokenizers", "safetensors", "triton", "numpy"),
)


#: How the files begin that PEFT and transformers save.
RESULTS = ("adapter_", "earlier", "model", "config.json", "generation_config.json")


class RunDir:
    """The folder of one run: `check` it before anything is loaded, `create` it when training starts."""

    writes = True

    def __init__(self, path: str | Path, key: str = "output_dir") -> None:
        self.path, self._key = Path(os.path.expanduser(path)), key

    def check(self, may_resume: bool = False) -> None:
        """Raises ConfigError where the folder cannot be written, or is used already, unless by a run that is
        gone on with; leaves nothing behind.
        """
        if self.path.is_dir() and not (may_resume and (self.path / "config.resolved.yaml").is_file()):
            used = sorted(f.name for f in self.path.iterdir())
            if "config.resolved.yaml" in used:
                raise ConfigError(
                    f"{self._key}: {self.path} holds a run; go on with it (--resume auto), choose another "
                    f"{self._key}, or empty it to start over"
                )
            if used:
                more = ", ..." if len(used) > 3 else ""
                raise ConfigError(
                    f"{self._key}: {self.path} is not empty (it holds {', '.join(used[:3])}{more}); "
                    f"choose another {self._key}, or empty it to start over"
                )
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ConfigError(f"{self._key}: {self.path} cannot be written: {error.strerror}") from None
        finally:
            for folder in missing:
                with suppress(OSError):  # what was never made
                    folder.rmdir()

    def create(self, loaded: LoadedConfig, may_resume: bool = False) -> None:
        """Makes the folder and writes what is known before the first step."""
        self.check(may_resume)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.original.yaml").write_text(loaded.text, encoding="utf-8")
        resolved = yaml.safe_dump(
            loaded.config.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True
        )
        (self.path / "config.resolved.yaml").write_text(resolved, encoding="utf-8")
        self.write_json("env.json", environment())

    def write_json(self, name: str, value: Any) -> None:
        """Writes value to a file of the run, in one step: a reader sees the old content or the new."""
        self.write_text(name, json.dumps(value, indent=2, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes text to a file of the run, in one step."""
        fresh = self.path / f".{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.path / name)

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Appends one line to log.jsonl. Numbers that JSON lacks (nan, inf) are written as text."""
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line |= {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def copy_result(self, checkpoint: Path) -> None:
        """The adapter or model of a checkpoint becomes that of the run."""
        for path in checkpoint.iterdir():
            if path.name.startswith(RESULTS):
                shutil.copy2(path, self.path / path.name)

    def cut_log(self, step: int) -> None:
        """Takes back the lines about steps after `step`, which are done again, and the end."""
        path = self.path / "log.jsonl"
        if path.exists():
            # a process that was killed may have left half a line
            lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if _is_json(line)]
            kept = [x for x in map(json.loads, lines) if x["event"] != "end" and x.get("step", 0) <= step]
            self.write_text("log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def read_log(self, event: str) -> list[dict[str, Any]]:
        """The lines of log.jsonl of one event, in order."""
        lines = (self.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [values for line in lines if (values := json.loads(line))["event"] == event]


class NoRunDir(RunDir):
    """The folder for the processes that are not the first: it is there, and they write nothing."""

    writes = False

    def create(self, loaded: LoadedConfig, may_resume: bool = False) -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def cut_log(self, step: int) -> None:
        pass

    def copy_result(self, checkpoint: Path) -> None:
        pass

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        pass


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def environment() -> dict[str, Any]:
    """Versions, machine and command line, to reproduce a run or to paste into a report."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": {name: version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "command": sys.argv,
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("FASTLORA_", "OMP_", "CUDA_VISIBLE"))
        },
    }
