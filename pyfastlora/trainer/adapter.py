"""The adapter on a base: a fresh one as the configuration describes it, or one to go on training."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import ConfigError
from pyfastlora.trainer.loading import attach
from pyfastlora.trainer.model import first_line, vocabulary_of
from pyfastlora.trainer.precision import Precision
from pyfastlora.trainer.stacked import linears

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS_32X = 32  # GPUs multiply matrices in tiles of as many columns


def add_adapter(
    model: PreTrainedModel,
    config: Config,
    precision: Precision,
    tokenizer: PreTrainedTokenizerBase,
    resumes: bool = False,
) -> PeftModel | PreTrainedModel:
    """The base with an adapter and all else frozen; without `adapter`, the base itself, to be trained.

    resumes: the weights come from a checkpoint afterwards, so that no start for them is computed. On the meta
    device none is either. Raises ConfigError where the target modules or modules to save are not there, or
    where the tokenizer has tokens that the embeddings lack and nobody trains.
    """
    rows = _rows(model, config, tokenizer)
    if config.adapter is None:
        _resize(model, rows)
        return model
    if config.lora_model_dir is not None:
        adapted: Any = _go_on(model, config, precision, tokenizer)
    else:
        new = _fit_embeddings(model, rows, config, tokenizer)
        adapted = _fresh(model, config, precision, new, resumes or model.device.type == "meta")
    if config.gradient_checkpointing and config.gradient_checkpointing_kwargs.use_reentrant:
        adapted.enable_input_require_grads()  # else the first checkpoint has no input that needs a gradient
    return adapted


def _fresh(
    model: PreTrainedModel, config: Config, precision: Precision, new: list[int], plain: bool
) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    _check_names(model, config.lora_modules_to_save, "lora_modules_to_save")
    rows = config.peft_trainable_token_indices
    init: Any = config.peft_init_lora_weights
    by_loftq = init == "loftq"
    # Earlier.begin makes the starts that are taken off the base, and knows what it took
    default = plain or by_loftq or config.init_of_base is not None
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only ever divides by it
        lora_dropout=config.lora_dropout,
        target_modules=_targets(model, config),
        modules_to_save=config.lora_modules_to_save or None,
        layers_to_transform=config.peft_layers_to_transform,
        trainable_token_indices=new if rows == "new" else rows,
        use_dora=config.peft_use_dora,
        use_rslora=config.peft_use_rslora,
        init_lora_weights=True if default else init,
    )
    _check_rows(model, lora.trainable_token_indices)
    try:
        adapted: Any = get_peft_model(model, lora, autocast_adapter_dtype=precision.adapter == torch.float32)
    except ValueError as error:
        raise ConfigError(f"adapter: PEFT cannot make it: {first_line(error)}") from error
    if by_loftq and not plain:
        _start_at_what_4_bits_lost(adapted, config)
    return adapted


def _check_rows(model: PreTrainedModel, indices: Any) -> None:
    listed = indices.values() if isinstance(indices, dict) else [indices or []]
    if (most := max((max(rows, default=0) for rows in listed), default=0)) >= vocabulary_of(model):
        raise ConfigError(
            f"peft_trainable_token_indices: the embeddings have {vocabulary_of(model)} rows; got {most}"
        )


def _start_at_what_4_bits_lost(model: PeftModel, config: Config) -> None:
    """LoftQ (Li et al., 2023), one step: s B A is the best of its rank for W less what 4 bits hold of it.

    PEFT's own needs a GPU, and leaves out s. The dense weights are in memory meanwhile.
    """
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(
        os.path.expanduser(config.base_model),
        dtype="auto",
        revision=config.revision_of_model,
        trust_remote_code=config.trust_remote_code,
    )
    with torch.no_grad():
        for name, layer in linears(model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight: Any = dense.get_submodule(name.removeprefix("base_model.model.")).weight
            lost = weight.to(a.device).float() - dequantize_module_weight(layer.get_base_layer()).float()
            u, size, v = torch.linalg.svd(lost, full_matrices=False)
            root = (size[: a.shape[0]] / layer.scaling["default"]).sqrt()
            a.copy_(root[:, None] * v[: a.shape[0]])
            b.copy_(u[:, : a.shape[0]] * root)


def _go_on(
    model: PreTrainedModel, config: Config, precision: Precision, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    from peft import PeftConfig, get_peft_model

    folder = Path(os.path.expanduser(config.lora_model_dir or ""))
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"lora_model_dir: {folder} holds no adapter (adapter_config.json)")
    saved: Any = PeftConfig.from_pretrained(str(folder))
    if saved.peft_type != "LORA":
        raise ConfigError(f"lora_model_dir: {folder} is a {saved.peft_type} adapter; lora can be trained on")
    _check_agrees(saved, config, folder)
    if model.device.type == "meta":
        saved.inference_mode = False
        fp32 = precision.adapter == torch.float32
        return get_peft_model(model, saved, autocast_adapter_dtype=fp32)
    return attach(model, [folder], precision, tokenizer, trained=True)


def _check_agrees(saved: LoraConfig, config: Config, folder: Path) -> None:
    """Raises ConfigError where the configuration says otherwise than the adapter that it goes on with."""
    for key, value in {
        "lora_r": saved.r,
        "lora_alpha": saved.lora_alpha,
        "lora_dropout": saved.lora_dropout,
        "peft_use_dora": saved.use_dora,
        "peft_use_rslora": saved.use_rslora,
    }.items():
        if key in config.model_fields_set and getattr(config, key) != value:
            raise ConfigError(
                f"{key} is {getattr(config, key)}, and {value} in the adapter of lora_model_dir ({folder}), "
                f"whose own configuration holds; remove the key"
            )


def _rows(model: PreTrainedModel, config: Config, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows the embeddings are to have."""
    rows = len(tokenizer)
    if config.resize_token_embeddings_to_32x:
        rows = -(-rows // _ROWS_32X) * _ROWS_32X
    return max(rows, vocabulary_of(model))


def _fit_embeddings(
    model: PreTrainedModel, rows: int, config: Config, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Grows the embeddings to `rows`; returns the new tokens. Raises ConfigError where none trains them."""
    before = vocabulary_of(model)
    added: Any = tokenizer.convert_tokens_to_ids(config.tokens) if config.tokens else []
    new = sorted({*added, *range(before, len(tokenizer))})
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()).rpartition(".")[2]
    whole, by_row = name in config.lora_modules_to_save, config.peft_trainable_token_indices == "new"
    if len(tokenizer) > before and not whole and not by_row:
        raise ConfigError(
            f"lora_modules_to_save: the tokenizer has {len(tokenizer)} tokens, {config.base_model} has "
            f"embeddings for {before}; add {name} and the output head, so that the rest is trained and "
            "saved, or say peft_trainable_token_indices: new"
        )
    _resize(model, rows)
    return new


def _resize(model: PreTrainedModel, rows: int) -> None:
    if rows != vocabulary_of(model):
        # new rows are drawn around the mean of the others, which the meta device does not have
        model.resize_token_embeddings(rows, mean_resizing=model.device.type != "meta")


def _targets(model: nn.Module, config: Config) -> list[str] | str:
    listed = config.lora_target_modules
    if isinstance(listed, str):
        if not any(re.fullmatch(listed, name) for name, _ in model.named_modules()):
            raise ConfigError(f"lora_target_modules: no module of {config.base_model} matches {listed!r}")
        return listed
    _check_names(model, listed or [], "lora_target_modules")
    if not config.lora_target_linear:
        return listed or []
    if listed or config.peft_layers_to_transform is not None:  # which PEFT wants names for
        return sorted({*(listed or []), *_linear_names(model)})
    return "all-linear"


def _check_names(model: nn.Module, wanted: Sequence[str], key: str) -> None:
    known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in wanted:
        if not any(full == name or full.endswith(f".{name}") for full, _ in model.named_modules()):
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean {close[0]}?"
                if close
                else f"; linear modules are {', '.join(_linear_names(model))}"
            )
            raise ConfigError(f"{key}: the model has no module called {name}{hint}")


def _linear_names(model: Any) -> list[str]:
    """Last names of all linear modules but the output head, as PEFT's all-linear has them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )
