"""`fastlora merge-lora`: the adapter's product added to the base, as a model that needs no PEFT.

    W' = W + sum of w_i s_i B_i A_i        DoRA: m / |W + s B A| * (W + s B A)

Summed in float32 and rounded once. A quantised base is dequantised first, for its 4-bit or 8-bit values are
the W beside which the adapter was trained: only with them does the merged model answer as the adapter does.
W' is not quantised again, which would round away changes smaller than the steps of 4 bits. Before anything is
written, the logits of both are compared.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfastlora.trainer.checkpoints import no_room
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import ConfigError, UserError
from pyfastlora.trainer.job import libraries_quiet
from pyfastlora.trainer.loading import (
    MERGED,
    Choice,
    attach,
    find_adapters,
    load_base,
    memory_told,
    names_of,
    settings_of,
    tokenizer_of,
)
from pyfastlora.trainer.precision import Precision, device_of_run, resolve_precision
from pyfastlora.trainer.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: How far logits may move, as a share of their spread: a dozen roundings of a value, or hundreds in float32.
#: LLM.int8 rounds activations to 8 bits as well, which a dense model does not.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE_OF_INT8 = 1e-1
_TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2, and nobody doubts it: def f(x): return x\n"
_TOKENS = 48


@dataclass(frozen=True)
class Request:
    """What is to be merged, and into what. dequant: False merges the adapter of a quantised base into the
    base's own weights. dtype: that of the merged model; None: that of the base.
    """

    choice: Choice
    weights: tuple[float, ...] = ()
    dequant: bool | None = None
    dtype: torch.dtype | None = None
    output: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Differences of logits, each as a share of the spread of the adapter's."""

    merged: float
    tolerance: float
    effect: float  # of the adapter on the base

    def __str__(self) -> str:
        return (
            f"logits of the merged model and of the adapter differ by {self.merged:.1e} of their spread "
            f"(at most {self.tolerance:.0e}); the adapter changes its base by {self.effect:.1e}"
        )


def merge(loaded: LoadedConfig, request: Request, console: Console) -> Path:
    """The folder with the merged model and its tokenizer. Raises UserError, and then nothing is written."""
    config = loaded.config
    output = request.output or str(Path(os.path.expanduser(config.output_dir)) / MERGED)
    target = RunDir(output, "--output")
    if config.adapter is None and not request.choice.adapters:
        raise ConfigError("adapter: the job trains the whole model: output_dir holds one without an adapter")
    if request.dequant is not None and not config.bits:
        raise ConfigError("--dequant goes with a quantised base (adapter: qlora, or load_in_8bit: true)")
    target.check()
    folders = find_adapters(config, request.choice)
    weights = _weights(folders, request.weights)
    with libraries_quiet(), memory_told("without a GPU in sight (CUDA_VISIBLE_DEVICES=) the CPU merges"):
        return _merge(config, request, folders, weights, target, console)


def _merge(
    config: Config,
    request: Request,
    folders: Sequence[Path],
    weights: Sequence[float],
    target: RunDir,
    console: Console,
) -> Path:
    device = device_of_run()
    precision = resolve_precision(config, device)
    if request.dequant is False:
        config = config.model_copy(update={"adapter": "lora", "load_in_4bit": None, "load_in_8bit": False})
        console.say("note: the base's own weights are not those the adapter was trained on")
    dtype = request.dtype or precision.base
    tokenizer = tokenizer_of(config)
    base = load_base(config, precision, device)
    base.config.use_cache = True  # for those who load what is written
    adapted: Any = attach(base, folders, precision, tokenizer, weights).eval()
    rows = _rows(tokenizer, int(adapted.get_input_embeddings().weight.shape[0]))
    wanted = _logits(adapted, rows, precision, device)
    with adapted.disable_adapter():
        before = _logits(adapted, rows, precision, device)
    merged = _merged(_dense(adapted.unload(), config, dtype), folders, weights, tokenizer)
    got = _logits(merged, rows, Precision(dtype, None, dtype), device)
    found = Comparison(
        _difference(got, wanted), _tolerance(config, precision, dtype), _difference(before, wanted)
    )
    if not found.merged <= found.tolerance:  # NaN is no number within it
        raise UserError(f"{found}; nothing is written")
    console.say(str(found))
    if found.merged > found.effect / 2:
        console.say(
            f"note: rounding to {_name(dtype)} moves the logits about as far as the adapter does; "
            "--dtype float32 keeps the adapter whole"
        )
    facts = {
        "base_model": config.base_model,
        "base_in": "its own weights" if config.bits is None else f"{config.bits} bits, dequantised",
        "adapters": {str(folder): weight for folder, weight in zip(folders, weights, strict=True)},
        "dtype": _name(dtype),
        "logits_differ_by": found.merged,
        "adapter_changes_logits_by": found.effect,
    }
    with written_whole(target.path) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        (folder / "merge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    console.say(f"merged model in {_name(dtype)} saved in {target.path}")
    return target.path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` (new, or empty) when the with block ends well."""
    fresh = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        fresh.rename(target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        why = no_room(error) or (error.strerror if isinstance(error, OSError) else None)
        if why is None:
            raise
        raise UserError(f"{target} could not be written: {why}; nothing is left of it") from error


def _weights(folders: Sequence[Path], given: tuple[float, ...]) -> tuple[float, ...]:
    """One for each adapter. Raises ConfigError where they do not fit, or where adapters cannot be summed."""
    weights = given or (1.0,) * len(folders)
    if len(weights) != len(folders):
        raise ConfigError(f"--weights: {len(weights)} for {len(folders)} adapters; give one for each")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"--weights must be numbers; got {', '.join(map(str, weights))}")
    if weights == (1.0,):
        return weights
    for folder in folders:
        settings: Any = settings_of(folder)
        whole = ("modules_to_save", "trainable_token_indices")
        key = next((k for k in ("use_dora", *whole) if getattr(settings, k, None)), None)
        if key == "use_dora":
            raise ConfigError(f"{folder}: DoRA scales the sum of base and adapter; it is merged alone, whole")
        if key is not None:
            raise ConfigError(f"{folder} has {key}: that is no change to be weighted; merge it alone")
    return weights


def _dense(base: Any, config: Config, dtype: torch.dtype) -> PreTrainedModel:
    """The base with floats for weights, in dtype."""
    if config.bits:
        base = base.dequantize(dtype=dtype)
    return base if base.dtype == dtype and not config.bits else base.to(dtype)


def _merged(
    base: PreTrainedModel,
    folders: Sequence[Path],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    in_float32 = Precision(base.dtype, None, torch.float32)  # in which B A is multiplied then
    model: Any = attach(base, folders, in_float32, tokenizer, weights)
    _untie(model)
    try:
        return model.merge_and_unload(adapter_names=names_of(folders)).eval()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{', '.join(map(str, folders))}: PEFT cannot merge it: {error}") from error


def _untie(model: Any) -> None:
    """Gives the head a weight of its own where an adapter is merged into one of the two that share it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        layers: list[Any] = [e.get_base_layer() if isinstance(e, BaseTunerLayer) else e for e in ends]
        if layers[0].weight is layers[1].weight:
            layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)


def _rows(tokenizer: Any, vocabulary: int) -> Tensor:
    """Token ids [4, 48]: text, random ones, and the last of the vocabulary, which training may have added."""
    text = (tokenizer(_TEXT)["input_ids"] * _TOKENS)[:_TOKENS]
    random = torch.randint(vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    last = torch.arange(vocabulary - _TOKENS, vocabulary).clamp_min(0)
    return torch.cat([torch.tensor([text]), random, last[None]])


def _logits(model: Any, rows: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """Of each row by itself, in float32 on the CPU, less their mean, which no probability depends on."""
    with torch.no_grad(), precision.cast(device):
        found = [model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in rows]
    logits = torch.stack([part.float().cpu() for part in found])
    return logits - logits.mean(-1, keepdim=True)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def _tolerance(config: Config, precision: Precision, dtype: torch.dtype) -> float:
    """Of the coarsest numbers involved."""
    if config.bits == 8:
        return TOLERANCE_OF_INT8
    return max(TOLERANCE[d] for d in (dtype, precision.base, precision.autocast) if d is not None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
