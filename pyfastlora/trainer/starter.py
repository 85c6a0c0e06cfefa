"""`fastlora init`: a first configuration for a model and a dataset, with what each key means beside it.

The dataset's first rows decide its type and sequence_len, the model's files what is possible. The values are
those that most runs of this kind begin with; they are a start, not an optimum.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyfastlora.trainer.config import DatasetKeys
from pyfastlora.trainer.config.load import check_text
from pyfastlora.trainer.config.yaml_lines import written
from pyfastlora.trainer.data.registry import CHATS, fitting_types
from pyfastlora.trainer.data.sources import open_source
from pyfastlora.trainer.errors import DataError, HubError, UserError

Kind = Literal["lora", "qlora", "dora", "full"]

_ROWS = 1000  # looked at
_CHARACTERS = 3  # to a token, rather too few
_LONGEST = 4096  # proposed
#: What fields of instructions and responses are called, where no type has both.
_ASKED = ("instruction", "prompt", "question", "query", "input", "source")
_ANSWERED = ("output", "response", "completion", "answer", "target", "chosen")


@dataclass(frozen=True)
class _Data:
    """Of the first rows: how many, tokens of the longest, and the lines of the type."""

    rows: int
    longest: int
    lines: tuple[str, ...]
    is_chat: bool


@dataclass(frozen=True)
class _Model:
    """What its folder says; None: not here to look at."""

    family: str | None
    positions: int | None
    has_template: bool | None


def starter(base_model: str, dataset: str, kind: Kind, type_name: str | None, file: str) -> str:
    """The text of a configuration that is to be `file`. Raises UserError where there is nothing to go by."""
    model, data = _look_at_model(base_model), _look_at_data(dataset, type_name)
    lines = [
        "# Written by `fastlora init`. docs/config.md has all keys.",
        f"#   fastlora doctor {file}    would it run?",
        f"#   fastlora train {file}",
        "",
        _line("base_model", written(base_model), _about(model)),
        "",
        "datasets:",
        f"  - path: {written(dataset)}",
        *(f"    {line}" for line in data.lines),
        *_template(model, data),
        *_held_out(data.rows),
        *_length(model, data),
        _line("sample_packing", "auto", "several samples to a row, if the model keeps them apart"),
        "",
        *_adapter(kind),
        "",
        _line("micro_batch_size", "2", "samples at once; more is faster, and takes memory"),
        _line("gradient_accumulation_steps", "4" if data.rows >= 200 else "1", "batches to a step"),
        _line("num_epochs", "3" if data.rows < _ROWS else "1", "times through the data"),
        _line("learning_rate", "2e-5" if kind == "full" else "2e-4", "lower it where the loss jumps"),
        _line("lr_scheduler", "cosine"),
        _line("warmup_ratio", "0.03", "of the steps, with a rising learning rate"),
        _line("bf16", "auto", "bfloat16 where it is fast"),
        _line("gradient_checkpointing", "true", "less memory, a third more time; false if it fits without"),
        "",
        *(["evals_per_epoch: 2"] if data.rows >= 20 else []),
        _line("saves_per_epoch", "1", "checkpoints, to go on from with `--resume auto`"),
        _line("save_total_limit", "2"),
        _line("logging_steps", "5" if data.rows >= 200 else "1"),
        _line("output_dir", written(f"./outputs/{Path(file).stem}"), "a new or empty folder"),
    ]
    text = "\n".join(lines) + "\n"
    check_text(text, file)
    return text


def _line(key: str, value: str, meaning: str = "") -> str:
    text = f"{key}: {value}"
    return f"{text:<34}  # {meaning}" if meaning else text


def _look_at_model(name: str) -> _Model:
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"--base-model: {name}: no such folder (looked in {Path.cwd()})")
        return _Model(None, None, None)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--base-model: {name} has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--base-model: {name}/config.json cannot be read: {error}") from None
    text = config.get("text_config", config)
    settings = folder / "tokenizer_config.json"
    templates = (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
    )
    return _Model(config.get("model_type"), text.get("max_position_embeddings"), templates)


def _about(model: _Model) -> str:
    known = [model.family, model.positions and f"positions for {model.positions} tokens"]
    return ", ".join(part for part in known if part)


def _look_at_data(path: str, type_name: str | None) -> _Data:
    entry = DatasetKeys.model_validate({"path": path})
    try:
        numbered = list(itertools.islice(open_source(entry, "--dataset", streaming=True).rows(), _ROWS))
    except HubError as error:
        if type_name is None:
            raise DataError(f"{error}; without its first row, say what it is with --type") from None
        return _Data(_ROWS, 0, (f"type: {type_name}",), type_name in CHATS)
    if not numbered:
        raise DataError(f"--dataset: {path} has no rows")
    rows = [row.values for row in numbered]
    longest = max(_characters(row) for row in rows) // _CHARACTERS
    lines = (f"type: {type_name}",) if type_name else _type_of(numbered[0].where, rows[0])
    name = lines[0].partition(": ")[2].split()[0] if lines else ""
    return _Data(len(rows), longest, lines, name in CHATS)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else _CHARACTERS


def _type_of(where: str, row: Any) -> tuple[str, ...]:
    """The lines under `path` that make samples of such rows."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with fields; got {type(row).__name__}")
    if isinstance(row.get("input_ids"), list) and isinstance(row.get("labels"), list):
        return ()
    chats = [field for field, value in row.items() if _is_chat(value)]
    if chats:
        return _chat_lines(chats[0], row[chats[0]][0])
    fits = list(fitting_types(row))
    if fits:
        also = f"  # {' and '.join(fits[1:3])} would fit too" if fits[1:] else ""
        return (f"type: {fits[0]}{also}",)
    text = [field for field, value in row.items() if isinstance(value, str)]
    asked = next((name for name in _ASKED if name in text), text[0] if len(text) == 2 else None)
    answered = next((n for n in (*_ANSWERED, *text[1:2]) if n in text and n != asked), None)
    if asked is None or answered is None:
        names = ", ".join(f'"{name}"' for name in list(row)[:12])
        raise DataError(f"{where}: no type fits a row with {names or 'no fields'}; say it with --type")
    return (
        "type:  # a template of your own",
        f"  field_instruction: {written(asked)}",
        f"  field_output: {written(answered)}",
        '  format: "### Instruction:\\n{instruction}\\n\\n### Response:\\n"',
    )


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys())
            for m in value
        )
    )


def _chat_lines(field: str, message: dict[str, Any]) -> tuple[str, ...]:
    kind, usual = ("chat_template", "messages") if "role" in message else ("sharegpt", "conversations")
    named = () if field == usual else (f"field_messages: {written(field)}",)
    return (f"type: {kind}", *named)


def _template(model: _Model, data: _Data) -> list[str]:
    if not data.is_chat or model.has_template:
        return []
    if model.has_template is None:
        why = "the model's own, or ChatML where it has none"
        return [_line("chat_template", "tokenizer_default_fallback_chatml", why)]
    return [_line("chat_template", "chatml", "the tokenizer has none of its own")]


def _held_out(rows: int) -> list[str]:
    if rows < 20:
        return [
            "# val_set_size: 0.05                # held out, to see when it is enough; for more rows"
        ]
    return [_line("val_set_size", "0.05" if rows < _ROWS else "0.01", "held out, to see when it is enough")]


def _length(model: _Model, data: _Data) -> list[str]:
    wanted = 2048 if data.longest == 0 else 256
    while wanted < min(data.longest, _LONGEST):
        wanted *= 2
    length = min(wanted, model.positions or wanted)
    seen = f"; the longest of the first {data.rows} rows has about {data.longest}" if data.longest else ""
    return [_line("sequence_len", str(length), f"tokens of a row; longer samples are dropped{seen}")]


def _adapter(kind: Kind) -> list[str]:
    if kind == "full":
        return ["adapter:                            # none: every weight is trained"]
    what = {
        "lora": "qlora holds the base in 4 bits, a quarter of the memory",
        "qlora": "over a base in 4 bits",
    }
    return [
        _line("adapter", "qlora" if kind == "qlora" else "lora", what.get(kind, "")),
        *(["peft_use_dora: true"] if kind == "dora" else []),
        _line("lora_r", "16", "rank: 8 for a style, 64 and more for new knowledge"),
        _line("lora_alpha", "32", "scaling is lora_alpha / lora_r"),
        _line("lora_dropout", "0.05"),
        _line("lora_target_linear", "true", "every linear module but the output head"),
    ]
