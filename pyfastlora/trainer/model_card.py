"""README.md beside the adapter or model: a card with the facts of its run, of the run's own files.

It takes the place of the blank form that PEFT saves. One that a user has put there stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.data import DataKeys
from pyfastlora.trainer.config.loggers import LoggerKeys
from pyfastlora.trainer.config.run import RunKeys
from pyfastlora.trainer.report.facts import Facts, number
from pyfastlora.trainer.run_dir import RunDir
from pyfastlora.trainer.units import duration

NAME = "README.md"
MARK = "<!-- made by fastlora train; remove this line to keep your changes where training goes on -->"
_FORM = "# Model Card for Model ID"  # PEFT's, which nobody has filled in
#: Keys that are told even where they have their default.
_TOLD = (
    *("learning_rate", "optimizer", "lr_scheduler", "micro_batch_size", "gradient_accumulation_steps"),
    *("sequence_len", "sample_packing", "bf16", "seed"),
)
_ELSEWHERE = {*DataKeys.model_fields, *RunKeys.model_fields, *LoggerKeys.model_fields, "base_model"}


def users_own(folder: Path) -> str | None:
    """The card that is there and was not made by us or PEFT."""
    path = folder / NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text if text and MARK not in text and _FORM not in text else None


def write_card(run_dir: RunDir, kept: str | None) -> None:
    """The card of a run that has ended; or `kept`, where there was one before it was saved."""
    if run_dir.writes:
        run_dir.write_text(NAME, kept if kept is not None else card(Facts.read(run_dir.path)))


def card(facts: Facts) -> str:
    """Of the adapter or model of a run, with the header that the hub reads."""
    header = yaml.safe_dump(_header(facts.config), sort_keys=False, allow_unicode=True)
    parts = "\n".join(line for part in _parts(facts) for line in (*part, ""))
    return f"---\n{header}---\n\n{MARK}\n\n# {facts.path.resolve().name}\n\n{parts}"


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    adapter, base = config.get("adapter"), config["base_model"]
    kind = ["lora"] if adapter else []
    kind += [adapter] if adapter and adapter != "lora" else []
    kind += ["dora"] if config.get("peft_use_dora") else []
    relation = f"base_model:{'adapter' if adapter else 'finetune'}:{base}"
    local = Path(base).expanduser().exists()  # the hub knows no folders of this machine
    return {
        **({} if local else {"base_model": base}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*([] if local else [relation]), *kind, "pyfastlora"],
    }


def _parts(facts: Facts) -> Iterator[list[str]]:
    config, packages = facts.config, facts.environment.get("packages", {})
    version, base = packages.get("pyfastlora", ""), _code(config["base_model"])
    yield [f"{_method(config)}, trained with pyfastlora {version} from {base}."]
    yield ["```python", *_loading(config), "```"]
    yield ["## What came of it", "", *_table(_results(facts))]
    yield ["## Data", "", *_datasets(facts.data)]
    yield ["## Settings", "", *_table(_settings(config))]
    yield ["## Machine and versions", "", *_table(_machine(facts))]


def _method(config: Mapping[str, Any]) -> str:
    if not config.get("adapter"):
        return "A model whose weights were all trained"
    name = {"lora": "LoRA", "qlora": "QLoRA"}.get(config["adapter"], str(config["adapter"]))
    return f"A {name} adapter" + (" with DoRA" if config.get("peft_use_dora") else "")


def _loading(config: Mapping[str, Any]) -> Iterator[str]:
    adapter, folder = config.get("adapter"), json.dumps(config["output_dir"], ensure_ascii=False)
    of = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    others = "AutoTokenizer" if adapter else f"{of}, AutoTokenizer"
    quantised = config.get("load_in_8bit") or adapter == "qlora"
    if adapter:
        yield f"from peft import {of}"
    yield f"from transformers import {others}" + (", BitsAndBytesConfig" if quantised else "")
    yield ""
    yield f"folder = {folder}  # or where it is now"
    if adapter == "qlora":
        given = config.get("bnb_config_kwargs", {})
        kind, nested = given.get("bnb_4bit_quant_type", "nf4"), given.get("bnb_4bit_use_double_quant", True)
        yield "base = BitsAndBytesConfig("
        yield f'    load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={nested}'
        yield ")"
    elif quantised:
        yield "base = BitsAndBytesConfig(load_in_8bit=True)"
    yield f"model = {of}.from_pretrained(folder{', quantization_config=base' if quantised else ''})"
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"


def _results(facts: Facts) -> Iterator[tuple[str, str]]:
    tokens, trained = facts.tokens
    records, end = facts.records, (facts.events("end") or [{}])[-1]
    epochs = f", {records[-1]['epoch']:.2f} epochs" if records and "epoch" in records[-1] else ""
    yield "steps", f"{facts.steps}{epochs}"
    if "weights_of" in end:
        yield "weights", f"of {end['weights_of']}, which had the lowest held-out loss"
    if records:
        yield "last training loss", f"{number(records[-1]['loss']):.4f} per trained token"
    if facts.held_out:
        yield "held-out loss", ", ".join(f"{loss:.4f} at step {step}" for step, loss in _some(facts.held_out))
    yield "tokens", f"{tokens:,}, of which {trained:,} were trained on"
    if facts.seconds:
        yield "time", f"{duration(facts.seconds)} in training steps, {tokens / facts.seconds:,.0f} tokens/s"


def _some(held_out: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The first, the lowest and the last."""
    lowest = min(held_out, key=lambda pair: pair[1])
    return sorted({held_out[0], lowest, held_out[-1]})


def _datasets(data: Mapping[str, Any]) -> Iterator[str]:
    keys = ("samples", "tokens", "trained_tokens")
    yield "| dataset | samples | tokens | trained tokens |"
    yield "|---|---|---|---|"
    for name, counts in data.get("datasets", {}).items():
        cells = " | ".join("" if counts.get(key) is None else f"{counts[key]:,}" for key in keys)
        yield f"| {_code(name)} | {cells} |"
    if held_out := data.get("held_out_samples"):
        trained = data.get("train_samples")  # of a stream nobody knows
        yield ""
        yield ("" if trained is None else f"{trained:,} samples trained on, ") + f"{held_out:,} held out."


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was trained with: the keys that matter, and those that are not as they are by default."""
    for key, field in Config.model_fields.items():
        value = config.get(key)
        default = field.get_default(call_default_factory=True)
        default = default.model_dump(exclude_none=True) if hasattr(default, "model_dump") else default
        told = key in _TOLD or (key not in _ELSEWHERE and value is not None and value != default)
        if told and value is not None:
            yield _code(key), _code(json.dumps(value, ensure_ascii=False, default=str))


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    env, strategy = facts.environment, facts.strategy
    gpus = env.get("gpus") or []
    yield "device", f"{len(gpus)} x {gpus[0]}" if gpus else f"{env.get('cpu', 'CPU')}"
    yield "processes", f"{strategy.get('processes', 1)}, {strategy.get('name', 'single')}"
    yield "Python", str(env.get("python", ""))
    for name, version in env.get("packages", {}).items():
        if version:
            yield name, str(version)


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"


def _code(text: Any) -> str:
    """Text as it is, in a cell of a table too."""
    return "`" + str(text).replace("`", "'").replace("\n", " ").replace("|", "\\|") + "`"
