"""FSDP2: torch's fully_shard around every layer and the whole, and what is saved of a model in shards.

On a CPU as on a GPU. transformers would hand this to accelerate, which trains with DDP on a CPU and says
nothing; and it would cast adapters to 16 bits, where a single process trains them in 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from pyfastlora.trainer.config.engine import FsdpKeys
from pyfastlora.trainer.errors import ConfigError

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, keys: FsdpKeys, device: torch.device, processes: int, offload: bool) -> None:
    """Divides the model among the processes, in place; a layer's weights are whole only while it computes."""
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes,)),
        "reshard_after_forward": keys.reshard_after_forward,
        "offload_policy": policy,
    }
    for layer in layers_of(model, keys):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def layers_of(model: nn.Module, keys: FsdpKeys) -> list[nn.Module]:
    """The modules that are sharded one by one. Raises ConfigError where none is of the class asked for."""
    asked = keys.transformer_layer_cls_to_wrap
    own = list(getattr(model, "_no_split_modules", None) or [])
    names = [asked] if isinstance(asked, str) else asked or own
    found = [m for m in model.modules() if _is_a(m, names)]
    if asked and not found:
        raise ConfigError(
            f"fsdp_config.transformer_layer_cls_to_wrap: the model has no module of class {', '.join(names)}"
        )
    return found


def whole_model(model: nn.Module, trained_only: bool) -> dict[str, Any]:
    """The weights out of all shards, on the CPU; empty but in the first process. All have to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


def save_optimizer(model: Any, optimizer: Any, path: Path, is_first: bool) -> None:
    """Writes the states out of all shards, by parameter name. All processes have to call it."""
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if is_first:
        torch.save(state, path)


def load_optimizer(model: Any, optimizer: Any, path: Path) -> None:
    """Takes up what save_optimizer wrote."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def _is_a(module: nn.Module, names: list[str]) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)
