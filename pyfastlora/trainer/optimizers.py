"""Which parameters an optimizer holds with which learning rate and decay, where that is not one for all.

LoRA+ (Hayou et al., 2024; `peft/optimizers/loraplus.py`): B and biases learn at loraplus_lr_ratio times the
learning rate of A, adapters on embeddings at a rate of their own. embedding_lr is that of embeddings and head
trained whole, lr_groups those of chosen modules; the first group in the list that names a parameter has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import SGD
from transformers import get_scheduler

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import ConfigError
from pyfastlora.trainer.schedules import is_ours

Groups = list[dict[str, Any]]
#: Arguments of every optimizer that have a key of their own.
_KEYS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def with_arguments(kind: type, arguments: dict[str, Any], c: Config) -> dict[str, Any]:
    """The arguments of an optimizer class with optim_args in their place; Trainer reads them for some only.

    Raises ConfigError for a name that the class does not take.
    """
    given = c.optim_args or {}
    if isinstance(given, str):
        pairs = (part.split("=") for part in given.split(","))
        given = {name.strip(): yaml.safe_load(value) for name, value in pairs}
    known = inspect.signature(kind).parameters
    for name in given:
        if name in _KEYS:
            raise ConfigError(f"optim_args: {name} is the key {_KEYS[name]}; say that")
        if name not in known or name == "params":
            names = ", ".join(n for n in known if n not in ("self", "params", *_KEYS))
            raise ConfigError(f"optim_args: {c.optimizer} has no argument {name}; it takes {names}")
    return arguments | given


def check_steps(model: nn.Module, kind: type, arguments: dict[str, Any], c: Config) -> None:
    """Raises ConfigError for groups without parameters, and where optimizer or schedule cannot be made."""
    if has_groups(c):
        groups_of(model, c, ())
    one = [nn.Parameter(torch.zeros(2, 2))]
    try:
        kind(one, **{name: value for name, value in arguments.items() if name != "params"})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim_args: {c.optimizer} cannot be made: {error}") from error
    if is_ours(c):
        return
    try:
        # of any warm-up and length
        get_scheduler(c.lr_scheduler, SGD(one), 1, 10, scheduler_specific_kwargs=dict(c.lr_scheduler_kwargs))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler_kwargs: {c.lr_scheduler} cannot be made: {error}") from error


def has_groups(c: Config) -> bool:
    """Whether parameters have different learning rates."""
    return bool(c.loraplus_lr_ratio or c.lr_groups or c.embedding_lr or c.embedding_lr_scale)


def groups_of(model: nn.Module, c: Config, decayed: Iterable[str]) -> Groups:
    """Parameter groups for an optimizer, one for each pair of learning rate and decay.

    decayed: names of parameters that weight_decay holds for. Raises ConfigError where an entry of lr_groups,
    or embedding_lr, is of no parameter that is trained.
    """
    whole = _trained_embeddings(model) if c.embedding_lr or c.embedding_lr_scale else set()
    decayed, found = set(decayed), dict[tuple[float, float], list[nn.Parameter]]()
    unused = {group.name for group in c.lr_groups}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        group = next((g for g in c.lr_groups if any(_is_in(name, part) for part in g.modules)), None)
        if group is not None:
            unused.discard(group.name)
            rate = group.lr
        elif id(p) in whole:
            rate = c.embedding_lr or c.learning_rate * (c.embedding_lr_scale or 1.0)
        else:
            rate = _of_lora(name, p, c)
        found.setdefault((rate, c.weight_decay if name in decayed else 0.0), []).append(p)
    if unused:
        raise ConfigError(f"lr_groups: no trained parameter is in the modules of {', '.join(sorted(unused))}")
    if not whole and (c.embedding_lr or c.embedding_lr_scale):
        raise ConfigError(
            "embedding_lr: neither embeddings nor head are trained; add them to lora_modules_to_save"
        )
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in found.items()]


def _of_lora(name: str, p: nn.Parameter, c: Config) -> float:
    if c.loraplus_lr_ratio is None:
        return c.learning_rate
    if ".lora_embedding_" in name:
        return c.loraplus_lr_embedding
    return c.learning_rate * (c.loraplus_lr_ratio if "lora_B" in name or p.dim() == 1 else 1.0)


def _is_in(parameter: str, module: str) -> bool:
    return f".{module}." in f".{parameter}"


def _trained_embeddings(model: Any) -> set[int]:
    """Of embeddings and head: their weights, PEFT's copies in modules_to_save, trained rows; not adapters."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    named = (pair for m in modules for pair in m.named_parameters())
    return {id(p) for name, p in named if p.requires_grad and "lora_" not in name}
