"""Reads a configuration file: YAML and --set in, a Config out, or every mistake at once with its place.

A message is `cfg.yaml:12:1: micro_batchsize: unknown key; did you mean micro_batch_size?`: where (line and
column), which key, what was needed, what was found. A value given by --set has no place; `--set` stands where
the file would. `base_config: other.yaml` is read first: mappings are joined key by key, all else is replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pyfastlora.trainer.config import yaml_lines
from pyfastlora.trainer.config.foreign import (
    FOREIGN,
    FOREIGN_OF_DATASETS,
    SECTIONS,
    Fate,
    Note,
    Refusal,
    is_off,
)
from pyfastlora.trainer.config.rules import RULES
from pyfastlora.trainer.config.schema import Config
from pyfastlora.trainer.config.wording import nearest, show, spell, suggest, wanted
from pyfastlora.trainer.errors import ConfigError

BASE = "base_config"
Places = dict[yaml_lines.Path, yaml_lines.Place]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration with what belongs beside it: the file's own text, its name, and notes for the user."""

    config: Config
    text: str
    name: str
    notes: tuple[str, ...]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> LoadedConfig:
    """The configuration in the YAML file `path`, changed by overrides of the form key=value.

    Keys may be dotted and indexed (datasets[0].path); values are read as YAML. Raises ConfigError that
    lists every problem: not a file, not YAML, unknown keys, values of the wrong type, keys that contradict
    each other.
    """
    text = read_text(Path(path))
    values, places = _with_base(Path(path), text, ())
    reader = _Reading(str(path), values, places)
    for override in overrides:
        reader.override(override)
    config = reader.config()
    return LoadedConfig(config, text, str(path), tuple(reader.notes))


def check_text(text: str, name: str) -> None:
    """Raises ConfigError unless `text` is the configuration of a job; `name` is its file."""
    values, places = _with_base(Path(name), text, ())
    _Reading(name, values, places).config()


def _with_base(path: Path, text: str, within: tuple[Path, ...]) -> tuple[dict[str, Any], Places]:
    """The values of a file over those of its base_config, and where each was written."""
    located = yaml_lines.parse(text, str(path))
    values, places = {} if located.values is None else located.values, dict(located.places)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values; got {show(values)}")
    base = values.pop(BASE, None)
    if base is None:
        return values, places
    at = places[(BASE,)]
    if not isinstance(base, str):
        raise ConfigError(f"{at}: {BASE} must be the name of a file; got {show(base)}")
    other = path.parent / os.path.expanduser(base)
    chain = (*within, path.resolve())
    if other.resolve() in chain:
        raise ConfigError(f"{at}: {BASE}: {base} is based on this file: a circle")
    if not other.is_file():
        raise ConfigError(f"{at}: {BASE}: {other}: no such file")
    below, below_places = _with_base(other, read_text(other), chain)
    kept = {k: v for k, v in below_places.items() if not _replaced(k, below, values)}
    return _joined(below, values), kept | places


def _joined(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    joined = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        joined[key] = _joined(below[key], value) if both else value
    return joined


def _replaced(path: yaml_lines.Path, below: Any, above: Any) -> bool:
    """Whether what stands at path below is hidden by what is above."""
    for part in path:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return True
        if part not in above:
            return False
        below, above = below.get(part), above[part]
    return True


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: must be UTF-8 text; byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _Reading:
    """The values of one file on their way to a Config, with what is wrong and worth noting so far."""

    def __init__(self, name: str, values: dict[str, Any], places: Places) -> None:
        self.name, self.values, self.places = name, values, places
        self.overridden: set[yaml_lines.Path] = set()
        self.problems: list[tuple[tuple[int, int], str]] = []
        self.notes: list[str] = []

    def where(self, path: yaml_lines.Path) -> tuple[tuple[int, int], str]:
        """Line and column of the innermost written part of path (0: none), and how to name it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return (0, 0), "--set"
            if place := self.places.get(path[:end]):
                return (place.line, place.column), str(place)
        return (0, 0), self.name

    def problem(self, path: yaml_lines.Path, sentence: str) -> None:
        at, where = self.where(path)
        found = (at, f"{where}: {sentence}")
        if found not in self.problems:  # each member of a union complains
            self.problems.append(found)

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        path = _parse_path(key.strip())
        if not equals or path is None:
            raise ConfigError(f"--set {text}: must be key=value, for instance --set learning_rate=1e-4")
        if path == (BASE,):
            raise ConfigError(f"--set {BASE}: is read from the file only")
        target: Any = self.values
        for i, part in enumerate(path):
            if isinstance(part, int):
                if not isinstance(target, list) or part >= len(target):
                    raise ConfigError(f"--set {key}: {spell(path[:i])} has no entry {part}")
            elif not isinstance(target, dict):
                raise ConfigError(f"--set {key}: {spell(path[:i])} has no keys")
            if i == len(path) - 1:
                target[part] = yaml_lines.parse_scalar(value, f"--set {key}")
            elif isinstance(part, str):
                if target.get(part) is None:
                    target[part] = {}
                target = target[part]
            else:
                target = target[part]
        self.overridden.add(path)

    def config(self) -> Config:
        self._foreign_keys()
        self._drop_blank_keys()
        strict = self.values.get("strict", True) is not False
        config, bad = self._fields(strict)
        if config is not None:
            for rule in RULES:
                for keys, sentence in rule(config):
                    if not bad.intersection(_parse_path(k)[0] for k in keys):  # type: ignore[index]
                        self._conflict(keys, sentence)
        if self.problems:
            raise ConfigError(
                "\n".join(sentence for _, sentence in sorted(self.problems, key=lambda p: p[0]))
            )
        assert config is not None
        return config

    def _foreign_keys(self) -> None:
        self._explain((), self.values, FOREIGN)
        for section in SECTIONS:
            entries = self.values.get(section)
            if isinstance(entries, dict):  # one entry alone
                self._explain((section,), entries, FOREIGN_OF_DATASETS)
            for i, entry in enumerate(entries if isinstance(entries, list) else []):
                if isinstance(entry, dict):
                    self._explain((section, i), entry, FOREIGN_OF_DATASETS)

    def _explain(self, at: yaml_lines.Path, values: dict[str, Any], known: Mapping[str, Fate]) -> None:
        """Take the keys that are none of ours out of a mapping: translated, noted or refused."""
        for key in [k for k in values if k in known]:
            value, fate, path = values.pop(key), known[key], (*at, key)
            if is_off(value):
                continue
            if isinstance(fate, Note):
                self.notes.append(f"{spell(path)}: {fate.sentence}")
            elif isinstance(fate, Refusal):
                self.problem(path, f"{spell(path)}: {show(value)} cannot be had: {fate.sentence}")
            elif not is_off(values.get(fate.key)):
                self.problem(path, f"{key} and {fate.key} say the same in two ways; keep {fate.key}")
            else:
                values[fate.key] = fate.value_of(value)
                self.places[(*at, fate.key)] = self.places.get(path, yaml_lines.Place(0, 0, "--set"))
                self.notes.append(f"{spell(path)}: read as {fate.key}: {show(values[fate.key])}")

    def _drop_blank_keys(self) -> None:
        for key in [k for k, v in self.values.items() if v is None and k in Config.model_fields]:
            del self.values[key]  # `key:` with nothing behind it means its default, as in Axolotl

    def _fields(self, strict: bool) -> tuple[Config | None, set[str | int]]:
        """The Config and the top-level keys that were wrong.

        What was wrong is left out, so that the rules between keys can still be checked for the rest.
        """
        values, bad = dict(self.values), set[str | int]()
        try:
            return Config.model_validate(values), bad
        except ValidationError as error:
            for e in error.errors(include_url=False):
                self._field_problem(e, strict)
                bad.add(e["loc"][0])
                values.pop(str(e["loc"][0]), None)
        for key, field in Config.model_fields.items():
            if field.is_required() and key in bad:
                values[key] = _PLACEHOLDERS[key]
        try:
            return Config.model_validate(values), bad
        except ValidationError:
            return None, bad

    def _field_problem(self, error: Any, strict: bool) -> None:
        loc, kind = error["loc"], error["type"]
        path = loc if kind == "missing" else _written_path(loc, self.values)
        key = spell(path)
        if kind == "extra_forbidden":
            sentence = f"{key}: unknown key{nearest(path)}"
            if strict or len(path) > 1:
                self.problem(path, sentence)
            else:
                self.notes.append(f"{self.where(path)[1]}: {sentence} (ignored: strict is false)")
        elif kind == "missing":
            self.problem(path[:-1], f"{key}: required key is missing")
        elif kind == "value_error":  # our own validators word the whole condition
            sentence = str(error["ctx"]["error"])
            allowed = re.findall(r"[\w.]+", sentence.partition("; got")[0].partition("one of")[2])
            hint = suggest(str(error["input"]), allowed)
            self.problem(
                path, f"{key} {sentence}{hint}" if sentence.startswith("must") else f"{key}: {sentence}"
            )
        else:
            needed = wanted(path, error)
            allowed = re.findall(r"\w+", needed) if kind == "literal_error" else []
            hint = suggest(str(error["input"]), allowed)
            self.problem(path, f"{key} must be {needed}; got {show(error['input'])}{hint}")

    def _conflict(self, keys: tuple[str, ...], sentence: str) -> None:
        path = next((p for k in keys if (p := _parse_path(k)) and self.where(p)[1] != self.name), ())
        self.problem(path or (), sentence)


_PLACEHOLDERS = {
    "base_model": "-",
    "learning_rate": 1.0,
}


def _parse_path(text: str) -> yaml_lines.Path | None:
    """("datasets", 0, "path") from datasets[0].path or datasets.0.path."""
    if not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", text):
        return None
    return tuple(int(p) if p.isdigit() else p for p in re.findall(r"\w+", text))


def _written_path(loc: tuple[str | int, ...], values: Any) -> yaml_lines.Path:
    """The parts of loc that exist in the file: pydantic puts the members of a union between them."""
    path: list[str | int] = []
    for part in loc:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and part in range(len(values))
        ):
            values = values[part]  # type: ignore[index]
            path.append(part)
    return tuple(path)
