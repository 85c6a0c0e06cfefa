"""`fastlora train --dry-run`: one step on the fullest batch, in a folder that is gone afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pyfastlora.trainer import model as models
from pyfastlora.trainer.adapter import add_adapter
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.data.prepare import PreparedData
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.packing import PackedRows
from pyfastlora.trainer.precision import device_of_run, resolve_precision
from pyfastlora.trainer.processes import join
from pyfastlora.trainer.rehearsal import base_on_meta
from pyfastlora.trainer.run_dir import RunDir
from pyfastlora.trainer.units import in_words

_ONE_STEP = {
    **{"max_steps": 1, "logging_steps": 1, "report_samples": 0},
    **{"save_strategy": "no", "save_steps": None, "saves_per_epoch": None},
    **dict.fromkeys(("use_tensorboard", "use_wandb", "use_mlflow", "use_trackio"), False),
    **{"eval_strategy": "no", "eval_steps": None, "evals_per_epoch": None, "eval_on_start": False},
}


def dry_run(loaded: LoadedConfig, console: Console) -> None:
    """Forward, backward and optimizer step, an evaluation of one batch, saving and loading; then a report.

    output_dir is only looked at. Raises UserError for all that training would, and where what was saved
    cannot be read.
    """
    from pyfastlora.trainer.job import Start, libraries_quiet, run

    processes = join()
    if not processes.is_first:
        console = Console(quiet=True)
    RunDir(loaded.config.output_dir).check()
    for note in loaded.notes:
        console.say(f"note: {note}")
    with tempfile.TemporaryDirectory(prefix="fastlora-dry-run-") as folder:
        run_dir = RunDir(Path(folder) / "run")
        config = loaded.config.model_copy(update={**_ONE_STEP, "output_dir": str(run_dir.path)})
        start = Start(False, None, False)
        result = run(
            dataclasses.replace(loaded, config=config), run_dir, console, processes, start, choose=fullest
        )
        if not processes.is_first:
            return
        with libraries_quiet():
            size = check_saved(config, run_dir.path)
        step, memory = run_dir.read_log("train")[-1], json.loads((run_dir.path / "plan.json").read_text())
    console.head("dry run")
    console.say(f"one step of {step['tokens']} tokens in {step['seconds']:.2f} s, loss {step['loss']:.4f}")
    if result.held_out_loss is not None:
        console.say(f"evaluated: held-out loss {result.held_out_loss:.4f} of one batch")
    measured, plan = memory["measured_bytes"], memory.get("planned")
    planned = f"{in_words(plan['total_bytes'])} planned" if plan else memory["not_planned"]
    taken = "not measured" if measured is None else f"{in_words(measured)} at most"
    console.say(f"memory: {taken}, {planned}")
    if result.kernels is not None:
        console.say(f"kernels: {result.kernels['fused']} of {result.kernels['total']} LoRA modules fused")
    where = loaded.config.output_dir
    console.say(f"saved and read back: {in_words(size)}; nothing is left of it, {where} is as it was")


def fullest(data: PreparedData, config: Config) -> PreparedData:
    """The data of one step and of one evaluation, of the longest samples or the fullest rows."""
    step = int(os.environ.get("WORLD_SIZE", 1)) * config.micro_batch_size * config.gradient_accumulation_steps
    held_out = data.held_out
    if held_out is not None:
        held_out = _longest(held_out, config.eval_batch_size or config.micro_batch_size)
    return dataclasses.replace(data, train=_longest(data.train, step), held_out=held_out)


def _longest(rows: Any, count: int) -> Any:
    if isinstance(rows, PackedRows):
        packing, lengths = rows.packing, np.asarray(rows.data["length"])
        tokens = np.add.reduceat(lengths[packing.samples], packing.starts[:-1])
        kept = [packing.row(i) for i in np.argsort(-tokens, kind="stable")[:count]]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in kept])]).astype(np.int64)
        fewer = dataclasses.replace(packing, samples=np.concatenate(kept), starts=starts)
        return PackedRows(rows.data, fewer)
    if "length" not in (getattr(rows, "column_names", None) or ()):
        return rows  # a stream, of which nobody knows the longest
    return rows.select(np.argsort(-np.asarray(rows["length"]), kind="stable")[:count])


def check_saved(config: Config, folder: Path) -> int:
    """Bytes of the weights in folder. Raises UserError where they are not the model's, or no numbers."""
    import torch
    from safetensors import safe_open

    saved: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                tensor = weights.get_tensor(name)
                saved[name] = tuple(tensor.shape)
                if not torch.isfinite(tensor).all():
                    raise UserError(f"after one step {name} has values that are not finite")
    missing = {name: shape for name, shape in _expected(config).items() if saved.get(name) != shape}
    if missing:
        name, shape = min(missing.items())
        raise UserError(f"what was saved lacks {len(missing)} weights, such as {name} {list(shape)}")
    return sum(file.stat().st_size for file in files)


def _expected(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is saved, of the model on the meta device."""
    import torch
    from peft import get_peft_model_state_dict

    precision = resolve_precision(config, device_of_run())
    tokenizer = models.load_tokenizer(config)
    base = base_on_meta(config, precision)
    with torch.device("meta"):
        model: Any = add_adapter(base, config, precision, tokenizer)
    if config.adapter:
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        if config.init_of_base is not None:  # stacked: the start that the base has not
            state = {
                name: t.repeat((2, 1) if "lora_A" in name else (1, 2)) if "lora_" in name else t
                for name, t in state.items()
            }
    else:
        state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
