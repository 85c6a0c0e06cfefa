"""Which model of a job is meant, found and loaded: its base, the base with adapters, or a whole one."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyfastlora.trainer import model as models
from pyfastlora.trainer.checkpoints import checkpoints
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.registry import CHATS, prompt_type
from pyfastlora.trainer.errors import ConfigError, UserError
from pyfastlora.trainer.memory import is_out_of_memory
from pyfastlora.trainer.precision import Precision, device_of_run, resolve_precision
from pyfastlora.trainer.stacked import on_untouched_base

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MERGED = "merged"  # the folder in output_dir


@dataclass(frozen=True)
class Choice:
    """What a command line asks for; nothing: what the job has left in output_dir.

    merged: the folder of a merged model; empty: the one in output_dir.
    """

    base: bool = False
    adapters: tuple[str, ...] = ()
    checkpoint: int | None = None
    merged: str | None = None

    def check(self) -> None:
        """Raises ConfigError where several models are meant."""
        given = {
            "--base": self.base,
            "--adapter": bool(self.adapters),
            "--checkpoint": self.checkpoint is not None,
            "--merged": self.merged is not None,
        }
        if len(asked := [option for option, is_given in given.items() if is_given]) > 1:
            raise ConfigError(f"{' and '.join(asked)} mean different models; keep one")


@dataclass(frozen=True)
class Chosen:
    """The base with these adapters; a whole model is the base of a configuration of its own."""

    config: Config
    adapters: tuple[Path, ...]
    precision: Precision
    name: str


@dataclass(frozen=True)
class LoadedModel:
    """In evaluation mode, with its tokenizer; name says which one it is."""

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision
    device: torch.device
    name: str


def load(config: Config, choice: Choice) -> LoadedModel:
    """The model that is meant. Raises UserError where it is not there, or cannot be loaded."""
    device = device_of_run()
    chosen = find(config, choice, device)
    tokenizer = tokenizer_of(config)
    base = load_base(chosen.config, chosen.precision, device)
    model: Any = base
    if chosen.adapters:
        model = attach(base, chosen.adapters, chosen.precision, tokenizer)
    else:
        _fit(base, len(tokenizer))
    return LoadedModel(model.eval(), tokenizer, chosen.precision, device, chosen.name)


def find(config: Config, choice: Choice, device: torch.device) -> Chosen:
    """What is meant, and that it is there. Raises ConfigError where it is not, or where two things are."""
    choice.check()
    precision = resolve_precision(config, device)
    output = Path(os.path.expanduser(config.output_dir))
    if choice.base:
        return Chosen(config, (), precision, config.base_model)
    if choice.merged is not None:
        folder = Path(os.path.expanduser(choice.merged)) if choice.merged else output / MERGED
        whole = _whole(config, folder, "--merged", "`fastlora merge-lora` makes it")
        return Chosen(whole, (), Precision(_dtype_of(folder), None, torch.float32), str(folder))
    if choice.adapters or config.adapter:
        folders = find_adapters(config, choice)
        return Chosen(config, folders, precision, f"{config.base_model} with {', '.join(map(str, folders))}")
    folder = _checkpoint(output, choice.checkpoint) if choice.checkpoint is not None else output
    whole = _whole(config, folder, "output_dir", "`fastlora train` makes it")
    return Chosen(whole, (), precision, str(folder))


def find_adapters(config: Config, choice: Choice) -> tuple[Path, ...]:
    """The folders of the adapters. Raises ConfigError for one that holds none."""
    choice.check()
    output = Path(os.path.expanduser(config.output_dir))
    if choice.checkpoint is not None:
        return (_adapter(_checkpoint(output, choice.checkpoint), "--checkpoint"),)
    if choice.adapters:
        return tuple(_adapter(Path(os.path.expanduser(folder)), "--adapter") for folder in choice.adapters)
    there = checkpoints(output)
    if there and not (output / "adapter_config.json").is_file():
        raise ConfigError(
            f"output_dir: the run in {output} is not finished; --checkpoint {there[-1].name.split('-')[1]} "
            "takes its newest checkpoint"
        )
    return (_adapter(output, "output_dir"),)


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a job, with the chat template that it trains with."""
    tokenizer = models.load_tokenizer(config)
    for entry in config.datasets:
        if entry.type in CHATS:
            prompt_type(config.with_template(entry), tokenizer)
            break
    return tokenizer


def load_base(config: Config, precision: Precision, device: torch.device) -> PreTrainedModel:
    """The base as it is trained on. Raises UserError where it, or the package it needs, is not there."""
    if config.bits:
        models.check_packages(config)
    models.check_base_model(config)
    return models.load_base(config, precision, device)


def attach(
    base: PreTrainedModel,
    folders: Sequence[Path],
    precision: Precision,
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[float] = (),
    trained: bool = False,
) -> PeftModel:
    """The base with adapters of PEFT's format, all active; with weights, each counts so often.

    trained: the one adapter is to be trained on; else everything is frozen.

    Raises UserError for an adapter that is not one of this base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    _fit(base, len(tokenizer), folders)
    fp32 = precision.adapter == torch.float32
    names = names_of(folders)
    model: Any = None
    for name, folder in zip(names, folders, strict=True):
        try:
            with warnings.catch_warnings(record=True) as said, on_untouched_base(folder) as source:
                warnings.simplefilter("always")
                if model is None:
                    model = PeftModel.from_pretrained(
                        base, str(source), name, is_trainable=trained, autocast_adapter_dtype=fp32
                    )
                    missing = any("missing adapter keys" in str(warning.message) for warning in said)
                else:
                    found = model.load_adapter(str(source), name, autocast_adapter_dtype=fp32)
                    missing = any(f".{name}." in key for key in found.missing_keys)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())
            raise UserError(f"{folder}: the adapter does not fit its base: {why[:300]}") from error
        if missing:
            raise UserError(f"{folder}: the adapter lacks weights for modules that its configuration names")
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    for name, weight in zip(names, weights, strict=False):
        _scale(model, name, weight)
    if not trained:
        model.requires_grad_(False)
    return model


@contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Makes a UserError, with advice, of memory that does not suffice; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {models.first_line(error)}; {advice}") from error


def names_of(folders: Sequence[Path]) -> list[str]:
    """PEFT's names of the adapters that `attach` loads."""
    return ["default", *(f"adapter_{i}" for i in range(1, len(folders)))]


def settings_of(folder: Path) -> PeftConfig:
    """An adapter's configuration. Raises UserError where it cannot be read."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/adapter_config.json: {models.first_line(error)}") from error


def _scale(model: Any, name: str, weight: float) -> None:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= weight


def _fit(base: Any, tokens: int, folders: Sequence[Path] = ()) -> None:
    """Gives the embeddings as many rows as they had in training."""
    rows = max((_rows_saved(folder, base) for folder in folders), default=0)
    rows = rows or max(tokens, models.vocabulary_of(base))
    if rows != models.vocabulary_of(base):
        base.resize_token_embeddings(rows, mean_resizing=False)


def _rows_saved(folder: Path, base: Any) -> int:
    """Rows of the embeddings that an adapter holds whole; 0 where it does not."""
    from safetensors import safe_open

    name = next(n for n, m in base.named_modules() if m is base.get_input_embeddings())
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return 0
    with safe_open(str(file), "pt") as weights:
        held = [key for key in weights.keys() if key.endswith(f"{name}.weight")]  # noqa: SIM118
        return max((weights.get_slice(key).get_shape()[0] for key in held), default=0)


def _adapter(folder: Path, option: str) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{option}: {folder}: no such folder; an adapter of PEFT's format is needed")
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{option}: {folder} has no adapter_config.json; it holds {models.listing(folder)}")
    return folder


def _checkpoint(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    if not folder.is_dir():
        there = ", ".join(c.name for c in checkpoints(output)) or "none"
        raise ConfigError(f"--checkpoint {step}: {output} has no such checkpoint; it has {there}")
    return folder


def _whole(config: Config, folder: Path, option: str, how: str) -> Config:
    """The configuration of a dense model in a folder of its own."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{option}: {folder} holds no model; {how}")
    plain = {
        "adapter": None if config.adapter is None else "lora",
        "load_in_8bit": False,
        "load_in_4bit": None,
    }
    return config.model_copy(update={"base_model": str(folder), "revision_of_model": None, **plain})


def _dtype_of(folder: Path) -> torch.dtype:
    """The dtype in which a model was saved."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--merged: {folder}/config.json cannot be read: {error}") from None
    found = getattr(torch, str(saved.get("dtype") or saved.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32
