"""How mistakes in a configuration are worded: what a key takes, what was meant by one that does not exist."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

from pyfastlora.trainer.config import yaml_lines
from pyfastlora.trainer.config.schema import Config

# What each of pydantic's error types means to someone who writes YAML.
_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "text that is not empty",
}


def spell(path: yaml_lines.Path) -> str:
    """A path as it is written on the command line: datasets[0].path."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _model_at(path: yaml_lines.Path) -> type[BaseModel] | None:
    """The schema whose keys stand at path."""
    model: type[BaseModel] | None = Config
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        if field is None:
            return None
        model = next(_models_in(field.annotation), None)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas of an annotation, inside lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def nearest(path: yaml_lines.Path) -> str:
    """What may have been meant by an unknown key: one of its neighbours, or one that belongs elsewhere."""
    key, model = str(path[-1]), _model_at(path[:-1])
    if model and (hint := suggest(key, model.model_fields, in_config=model is Config)):
        return hint
    for section, other in sections():
        if other is not model and key in other.model_fields:
            return f"; it is a key of {section}"
    return ""


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Where keys can stand, and the schema of each place."""
    yield "the top level", Config
    for name, field in Config.model_fields.items():
        for model in _models_in(field.annotation):
            yield name, model


def _section_of(key: str) -> str:
    """The subject of a key at the top level: that of the class that has it."""
    owner = next(group for group in Config.__mro__ if key in inspect.get_annotations(group))
    return owner.__name__.removesuffix("Keys").lower()


# A value of a union fails once per member; these say what the key takes as a whole, and of chat_template what
# the names mean to someone who knows Axolotl's.
_UNIONS = {
    "bf16": "true, false, auto or full",
    "tf32": "true, false or auto",
    "torch_compile": "true, false or auto",
    "optim_args": "a mapping, or text like name=value, name=value",
    "peft_layers_to_transform": "the number of a layer or a list of them",
    "peft_trainable_token_indices": "new, a list of tokens, or a mapping of a module's name to such a list",
    "adapter": "lora, qlora, relora or nothing",
    "sample_packing": "true, false or auto",
    "lora_target_modules": "a list of module names, or one regular expression",
    "data_files": "a file name or a list of them",
    "type": "a name, or a mapping that is a template",
    "chat_template": (
        "tokenizer_default (the one that comes with the model), tokenizer_default_fallback_chatml, chatml, "
        "or jinja with its text in chat_template_jinja"
    ),
}


def wanted(path: yaml_lines.Path, error: Any) -> str:
    if path[-1] in _UNIONS:
        return _UNIONS[str(path[-1])]
    context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    text = _WANTED.get(error["type"])
    return text.format(**context).replace("'", "") if text else error["msg"].lower()


def suggest(found: str, known: Iterable[str], *, in_config: bool = False) -> str:
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    if not close:
        return ""
    section = f" ({_section_of(close[0])} keys)" if in_config else ""
    return f"; did you mean {close[0]}?{section}"


def show(value: Any) -> str:
    """A value as it stands in YAML, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + '..."'
