"""The base model and its tokenizer, as a configuration asks for them."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyfastlora.trainer.config import BNB_OPTIMIZERS, TORCHAO_OPTIMIZERS, Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.loggers import check_loggers
from pyfastlora.trainer.memory import is_out_of_memory
from pyfastlora.trainer.model_config import load_model_config
from pyfastlora.trainer.precision import Precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
CPU_4BIT_WIDTH = 64  # bitsandbytes' CPU kernels read a weight's rows in blocks of this many columns


def check_packages(config: Config) -> None:
    """Raises UserError where the configuration needs a package that is not installed."""
    asked = {4: "adapter: qlora", 8: "load_in_8bit: true", None: f"optimizer: {config.optimizer}"}
    wants = asked[config.bits]
    needed = config.bits or config.optimizer in BNB_OPTIMIZERS
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'{wants} needs bitsandbytes: pip install "pyfastlora[qlora]"')
    if config.optimizer in TORCHAO_OPTIMIZERS and importlib.util.find_spec("torchao") is None:
        raise UserError(f"optimizer: {config.optimizer} needs torchao: pip install torchao")
    check_loggers(config)
    if config.torch_compile and config.torch_compile_backend is not None:
        import torch._dynamo

        known = torch._dynamo.list_backends(None)
        if config.torch_compile_backend not in known:
            given = config.torch_compile_backend
            raise UserError(f"torch_compile_backend: must be one of {', '.join(known)}; got {given}")


def check_base_model(config: Config, weights: bool = True) -> None:
    """Raises UserError where base_model is plainly not there or has no weights, before anything is loaded."""
    name, folder = config.base_model, Path(os.path.expanduser(config.base_model))
    if not folder.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"base_model: {name}: no such folder (looked in {Path.cwd()})")
        return  # perhaps a model of the hub; loading it tells
    if not folder.is_dir():
        raise UserError(f"base_model: {name} is a file; give the folder that holds the model")
    if not (folder / "config.json").is_file():
        raise UserError(f"base_model: {name} has no config.json; it holds {listing(folder)}")
    if weights and not any(f for pattern in WEIGHT_FILES for f in folder.glob(pattern)):
        raise UserError(
            f"base_model: {name} has no weights (model.safetensors or pytorch_model.bin); "
            f"it holds {listing(folder)}"
        )


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer with special_tokens and tokens applied. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    source = config.tokenizer_config or config.base_model
    key = "tokenizer_config" if config.tokenizer_config else "base_model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(source),
            revision=None if config.tokenizer_config else config.revision_of_model,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{key}: no tokenizer can be loaded from {source}: {first_line(error)}") from error
    special = {role: token for role, token in config.special_tokens.model_dump().items() if token is not None}
    if special:
        tokenizer.add_special_tokens(special)
    if config.tokens:
        tokenizer.add_tokens(config.tokens)
    return tokenizer


def load_base(config: Config, precision: Precision, device: torch.device) -> PreTrainedModel:
    """The base on device, dense or quantised. Raises UserError where it cannot be loaded."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {"dtype": precision.base, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        arguments["attn_implementation"] = config.attn_implementation
    if config.revision_of_model:
        arguments["revision"] = config.revision_of_model
    if config.overrides_of_model_config:
        arguments["config"] = load_model_config(config)
    if config.bits:
        arguments |= {"quantization_config": _bnb_config(config, precision), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(os.path.expanduser(config.base_model), **arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"base_model: {config.base_model} cannot be loaded: {first_line(error)}") from error
    if config.bits == 4 and device.type == "cpu":
        _make_4bit_trainable_on_cpu(model, config.base_model)
    model.config.use_cache = False
    return model if config.bits else model.to(device)  # type: ignore[arg-type]


def save(model: PeftModel | PreTrainedModel, folder: Path, state: dict[str, Any] | None = None) -> None:
    """The adapter in PEFT's format, or the whole model; with the weights of `state` where there is one."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        # trained embeddings are in modules_to_save; the default would add the frozen copy and ask the hub
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    else:
        model.save_pretrained(str(folder), state_dict=state)


def vocabulary_of(model: Any) -> int:
    """How many tokens the input embeddings have rows for."""
    return int(model.get_input_embeddings().weight.shape[0])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained values, and those of the whole model; a 4-bit weight counts as the values it stands for."""
    trained = total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        n = p.numel() if state is None else state.shape.numel()
        total += n
        trained += n if p.requires_grad else 0
    return trained, total


def _bnb_config(config: Config, precision: Precision) -> Any:
    from transformers import BitsAndBytesConfig

    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    kwargs = config.bnb_config_kwargs
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kwargs.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=kwargs.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=kwargs.bnb_4bit_compute_dtype or precision.base,
        bnb_4bit_quant_storage=kwargs.bnb_4bit_quant_storage,
    )


def _make_4bit_trainable_on_cpu(model: nn.Module, name: str) -> None:
    """Keeps bitsandbytes from repacking weights when it evaluates: a repacked base passes no gradient on."""
    import bitsandbytes as bnb

    check_4bit_widths(model, name, bnb.nn.Linear4bit)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_4bit_widths(model: nn.Module, name: str, kind: type[nn.Linear] = nn.Linear) -> None:
    """Raises UserError for linears that bitsandbytes cannot read in 4 bits on a CPU; the head stays dense."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if isinstance(module, kind) and module is not head and module.in_features % CPU_4BIT_WIDTH:
            raise UserError(
                f"base_model: on a CPU, 4-bit weights need inputs in multiples of {CPU_4BIT_WIDTH}; "
                f"{path} of {name} has {module.in_features}: use adapter: lora"
            )


def listing(folder: Path) -> str:
    """What a folder holds, for a sentence."""
    names = sorted(f.name for f in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def first_line(error: BaseException) -> str:
    """What an error says, short."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()
