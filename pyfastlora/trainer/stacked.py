"""Adapters whose base has changed beneath them, and what they are on the base as it was.

PiSSA and OLoRA take s B0 A0 off each weight before they train B A; ReLoRA adds s B A to it at every restart
and begins another. All that is of low rank, so that an adapter of more rank says the same on the untouched
base: B A + B1 A1 + ... is [B B1 ..] [A; A1; ..]. That is what a run leaves. A checkpoint holds the adapter as
it is trained, and beside it, in earlier.safetensors, what its base has taken in.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pyfastlora.trainer.errors import ConfigError

FILE = "earlier.safetensors"
_ADAPTER, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Earlier:
    """What the base of a model has taken in since it was loaded: of each linear, B and A in order."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._parts: list[dict[str, Tensor]] = []

    def begin(self, init: str) -> None:
        """Starts at the base's own strongest directions (PiSSA) or an orthogonal basis of them (OLoRA)."""
        for _, layer in linears(self._model):
            base, held = layer.get_base_layer(), layer.get_base_layer().weight.data.clone()
            factors = [getattr(layer, f"lora_{which}")["default"].weight for which in "AB"]
            dtypes = [p.dtype for p in factors]
            if init == "olora":
                layer.olora_init("default")
            else:
                layer.pissa_init("default", init)
            for p, dtype in zip(factors, dtypes, strict=True):
                p.data = p.data.to(dtype).contiguous()
            base.weight.data = held  # PEFT took off the factors before they were rounded
        self.took(-1)
        for _, layer in linears(self._model):
            add_to_base(layer, -_factor(layer, "B"), _factor(layer, "A"))

    def took(self, sign: int) -> None:
        """The base has taken in the adapter as it is now: added (1), or taken off (-1)."""
        part = {}
        for name, layer in linears(self._model):
            part[f"{name}.lora_A.weight"] = _factor(layer, "A").cpu().clone()
            part[f"{name}.lora_B.weight"] = _factor(layer, "B").cpu() * sign
        self._parts.append(part)

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        from safetensors.torch import save_file

        named = ((f"{i}:{name}", t) for i, part in enumerate(self._parts) for name, t in part.items())
        save_file({name: t.contiguous() for name, t in named}, folder / FILE)

    def read(self, folder: Path) -> None:
        """Makes the freshly loaded base that of a checkpoint, by the same steps and so bit for bit."""
        self._parts = []
        for part in _read(folder):
            self._parts.append(part)
            for name, layer in linears(self._model):
                add_to_base(layer, part[f"{name}.lora_B.weight"], part[f"{name}.lora_A.weight"])


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted linears. Raises ConfigError where something else is adapted."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if "default" not in module.lora_A:
                raise ConfigError(
                    f"{name}: only linears can be adapted where the base changes (PiSSA, OLoRA, ReLoRA); "
                    "remove it from lora_target_modules"
                )
            yield name, module


def add_to_base(layer: Any, b: Tensor, a: Tensor) -> None:
    """W += s B A, rounded once, in a new tensor: nothing that was derived from the old one holds."""
    weight = layer.get_base_layer().weight
    delta = layer.scaling["default"] * b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
    if layer.fan_in_fan_out:
        delta = delta.t()
    weight.data = (weight.data.float() + delta).to(weight.dtype)


def stack(folder: Path) -> None:
    """Makes of the adapter in folder, trained on a base that had changed, one on the base as it was."""
    from safetensors.torch import load_file, save_file

    parts, adapter = _read(folder), load_file(folder / _ADAPTER)
    for name, factor in adapter.items():
        if parts and name in parts[0]:
            along = 0 if name.endswith("lora_A.weight") else 1
            adapter[name] = torch.cat([factor, *(part[name].to(factor.dtype) for part in parts)], along)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    times = 1 + len(parts)
    config["r"] *= times
    config["lora_alpha"] *= math.sqrt(times) if config.get("use_rslora") else times  # the scaling stays
    config["init_lora_weights"] = True
    save_file(adapter, folder / _ADAPTER, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / FILE).unlink()


@contextmanager
def on_untouched_base(folder: Path) -> Iterator[Path]:
    """The folder, or a copy for a moment of one with a base that has changed, stacked."""
    if not (folder / FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for name in (_ADAPTER, _CONFIG, FILE):
            shutil.copy2(folder / name, made)
        stack(Path(made))
        yield Path(made)


def _factor(layer: Any, which: str) -> Tensor:
    weight: Tensor = getattr(layer, f"lora_{which}")["default"].weight
    return weight.detach()


def _read(folder: Path) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / FILE).items():
        number, _, name = key.partition(":")
        parts.setdefault(int(number), {})[name] = tensor
    return [parts[i] for i in sorted(parts)]
