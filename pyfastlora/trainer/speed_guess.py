"""Tokens per second of a job, guessed from a benchmark of `python -m bench.adapter_tax` on such a machine.

Its small model gives floating-point operations per second for an adapter and a number format; the job is
taken to reach as many: 4 per frozen weight and token, 6 per trained one, 2 more for each where the forward
runs twice. Attention and the data are left out, so this is a guess, and mostly too high.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.precision import Precision
from pyfastlora.trainer.rehearsal import Rehearsal

RESULTS = "bench/results/*/adapter_tax.json"


@dataclass(frozen=True)
class Guess:
    """tokens_per_second of one process; None where there is no benchmark. The sentence says which."""

    tokens_per_second: float | None
    sentence: str


def guess(model: Rehearsal, config: Config, benchmark: str | None = None) -> Guess:
    """From the file `benchmark`, or from one of this processor below bench/results here.

    Raises UserError for a named file that is none.
    """
    found = _read(Path(benchmark)) if benchmark else _of_this_processor()
    if found is None:
        why = f"no benchmark of this processor in {RESULTS} (--benchmark FILE)"
        return Guess(None, f"tokens per second: {why}")
    rate = _rate(found, config, model.precision)
    speed = rate / _operations(model, config)
    where = found["environment"].get("cpu", "its machine")
    return Guess(round(speed, 1), f"tokens per second: some {speed:.3g}, by the benchmark of {where}")


def _operations(model: Rehearsal, config: Config) -> float:
    """Floating-point operations per token."""
    weights = {id(p): p for m in model.model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    trained = sum(p.numel() for p in weights.values() if p.requires_grad)
    frozen = sum(p.numel() for p in weights.values()) - trained
    again = 2 * (trained + frozen) if config.gradient_checkpointing else 0
    return 4 * frozen + 6 * trained + again


def _rate(found: dict[str, Any], config: Config, precision: Precision) -> float:
    """Operations per second of the row that is most like the job."""
    feature = ("Q" if config.bits == 4 else "") + ("DoRA" if config.peft_use_dora else "LoRA")
    formats = {
        (torch.float32, None): "fp32",
        (torch.bfloat16, None): "bf16",
        (torch.bfloat16, torch.bfloat16): "bf16+fp32 autocast",
    }
    wanted = formats.get((precision.base, precision.autocast), "fp32")
    rows = [r for r in found["rows"] if r["level"] == "model" and r["feature"] == feature]
    row = next((r for r in rows if r["config"] == wanted), None)
    if row is None:
        raise UserError(f"--benchmark: the file has no row of {feature} in {wanted}")
    s = found["settings"]
    weights = s["layers"] * (4 * s["hidden"] ** 2 + 3 * s["hidden"] * s["intermediate"])
    seconds: float = row["ms"]["ours" if config.fastlora else "PEFT"]["median"] / 1e3
    return 4 * weights * float(row["tokens"]) / seconds


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--benchmark: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "adapter_tax":
        raise UserError(f"--benchmark: {path} is no result of `python -m bench.adapter_tax`")
    return found


def _of_this_processor() -> dict[str, Any] | None:
    if torch.cuda.is_available():
        return None
    here = torch.cpu.get_capabilities().get("cpu_name")
    for path in sorted(Path.cwd().glob(RESULTS)):
        found = _read(path)
        if here and found["environment"].get("cpu") == here:
            return found
    return None
