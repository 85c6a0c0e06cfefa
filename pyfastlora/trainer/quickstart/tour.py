"""The quickstart itself: text, base model, a training run through `fastlora train`, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyfastlora.trainer import job
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.config.yaml_lines import written
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.quickstart import base_model, corpus
from pyfastlora.trainer.run_dir import RunDir

Adapter = Literal["lora", "qlora", "dora"]


@dataclass(frozen=True)
class Options:
    """What the tour does. Only adapter and folder are a user's choice; a test shrinks the rest."""

    adapter: Adapter = "lora"
    folder: Path | None = None
    recipe: base_model.Recipe = field(default_factory=base_model.Recipe)
    library: Path | None = None
    epochs: float = 1.0
    compare_steps: int = 24
    samples: int = 3


_CONFIG = """\
# Written by `fastlora quickstart`. Run it again, changed as you like, with
#   fastlora train {folder}/quickstart.yaml --set output_dir={folder}/again

base_model: {base}

# Python functions and the first paragraphs of their docstrings; the two files share no source file.
datasets:
  - path: {train}
    type: alpaca
test_datasets:
  - path: {held_out}
    type: alpaca
sequence_len: 384

adapter: {adapter}
{extra}lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true

micro_batch_size: 8
num_epochs: {epochs}
learning_rate: 2e-3
lr_scheduler: cosine
warmup_steps: 10
bf16: auto
seed: 42

eval_on_start: true
evals_per_epoch: 2
save_strategy: no
logging_steps: 5
output_dir: {output}
"""
_EXTRA = {
    "lora": "",
    "qlora": "load_in_4bit: true  # NF4, double quantised\n",
    "dora": "peft_use_dora: true\n",
}


def run(options: Options, console: Console) -> dict[str, Any]:
    """Takes the tour; returns its figures, which are also in summary.json. Raises UserError."""
    started = time.perf_counter()
    folder = _folder(options)
    console.head("1. Text: the standard library of this Python")
    text = corpus.read_corpus(options.library)
    chars = sum(map(len, text.base_text)) / 1e6
    console.say(
        f"{chars:.1f} M characters for the base; {len(text.train)} documented functions to train on, "
        f"{len(text.held_out)} held out, from other files"
    )
    console.head("2. Base model: trained once, then cached")
    with job.libraries_quiet():
        base = base_model.obtain(options.recipe, text.base_text, console)

    console.head(f"3. fastlora train {folder / 'quickstart.yaml'}")
    folder.mkdir(parents=True, exist_ok=True)
    corpus.write_alpaca(text.train, folder / "train.jsonl")
    corpus.write_alpaca(text.held_out, folder / "held_out.jsonl")
    config_file = folder / "quickstart.yaml"
    config_file.write_text(_config(options, folder, base), encoding="utf-8")
    loaded = load_config(config_file)
    result = job.train(loaded, console)
    held_out = result.run_dir.read_log("eval")

    console.head("4. The same steps with PEFT's forward and with ours")
    from pyfastlora.trainer.data.prepare import prepare
    from pyfastlora.trainer.model import load_tokenizer
    from pyfastlora.trainer.quickstart.compare import compare
    from pyfastlora.trainer.quickstart.plots import save_curves
    from pyfastlora.trainer.quickstart.samples import answer, choose

    with job.libraries_quiet():
        data = prepare(loaded.config, load_tokenizer(loaded.config))
        comparison = compare(loaded.config, data.train, options.compare_steps, console)
        console.say(
            f"PEFT {comparison.peft_tokens_per_second:.0f} tokens/s, "
            f"pyfastlora {comparison.fast_tokens_per_second:.0f} tokens/s: {comparison.speedup:.2f} x"
        )
        console.say(
            f"largest difference between the two losses in {options.compare_steps} steps: "
            f"{comparison.largest_difference:.1e}"
        )
        console.head("5. Before and after, on functions it has never seen")
        with console.bar("answers", None):
            samples = answer(loaded.config, result.run_dir.path, choose(text.held_out, options.samples))
    for sample in samples:
        _show(sample, console)

    save_curves(folder / "curves.png", result.run_dir.read_log("train"), held_out, comparison)
    before, after = held_out[0]["eval_loss"], held_out[-1]["eval_loss"]
    summary = {
        "adapter": options.adapter,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "steps": result.steps,
        "comparison": dataclasses.asdict(comparison) | {"largest_difference": comparison.largest_difference},
        "samples": [dataclasses.asdict(sample) for sample in samples],
        "kernels": result.kernels,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    console.head("What came of it")
    console.say(
        f"held-out loss {before:.3f} -> {after:.3f} in {result.steps} steps, on files never seen in training"
    )
    console.say(f"{folder}/curves.png      loss curves and speed")
    console.say(f"{folder}/quickstart.yaml the configuration; edit it and run `fastlora train` on it")
    console.say(f"{folder}/run             adapter, log.jsonl, kernels.txt, report.html")
    console.say(f"{summary['seconds']:.0f} seconds in all")
    return summary


def _folder(options: Options) -> Path:
    """The folder asked for, which must be new or empty; else the first free quickstart/ADAPTER[-N]."""
    if options.folder is not None:
        RunDir(options.folder, "--dir").check()
        return options.folder
    names = [options.adapter, *(f"{options.adapter}-{n}" for n in range(2, 1000))]
    folder = next((f for f in (Path("quickstart", name) for name in names) if not f.exists()), None)
    if folder is None:
        raise UserError("quickstart/ holds a thousand runs; remove some, or name a folder with --dir")
    RunDir(folder, "--dir").check()
    return folder


def _config(options: Options, folder: Path, base: Path) -> str:
    return _CONFIG.format(
        folder=folder,
        base=written(str(base)),
        train=written(str(folder / "train.jsonl")),
        held_out=written(str(folder / "held_out.jsonl")),
        output=written(str(folder / "run")),
        adapter="qlora" if options.adapter == "qlora" else "lora",
        extra=_EXTRA[options.adapter],
        epochs=f"{options.epochs:g}",
    )


def _show(sample: Any, console: Console) -> None:
    console.say()
    console.say(sample.pair.code, style="dim")
    console.say(f"  docstring  {sample.pair.summary}   ({sample.pair.file})")
    console.say(f"  before     {sample.before}")
    console.say(f"  after      {sample.after}", style="green")
