"""An Axolotl file made ours: keys renamed in place, keys that cannot be had commented out with the reason.

Everything else, comments and layout included, stays as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pyfastlora.trainer.config import yaml_lines
from pyfastlora.trainer.config.foreign import (
    FOREIGN,
    FOREIGN_OF_DATASETS,
    SECTIONS,
    Fate,
    Note,
    Translation,
    is_off,
)
from pyfastlora.trainer.config.load import read_text
from pyfastlora.trainer.config.wording import show
from pyfastlora.trainer.errors import ConfigError


@dataclass(frozen=True)
class Converted:
    """The new text, and what was changed, a sentence each, in order."""

    text: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class _Key:
    """A foreign key as it stands in the text."""

    name: str
    fate: Fate
    key: yaml.Node
    value: yaml.Node
    values: dict[str, object]  # of its mapping


def convert(path: str | Path) -> Converted:
    """The file `path` with Axolotl's own keys replaced. Raises ConfigError for one that cannot be read."""
    name, text = str(path), read_text(Path(path))
    located = yaml_lines.parse(text, name)  # for its sentences
    if not isinstance(located.values, dict):
        raise ConfigError(f"{name}: must be a mapping of keys to values; got {show(located.values)}")
    root = yaml_lines.compose(text)
    changes: list[str] = []
    for found in sorted(_foreign(root, located.values), key=lambda k: -k.key.start_mark.index):
        text, change = _changed(text, found)
        changes.insert(0, f"{yaml_lines.Place.of(found.key, name)}: {change}")
    return Converted(text, tuple(changes))


def _foreign(root: yaml.Node, values: dict[str, object]) -> Iterator[_Key]:
    yield from _in_mapping(root, values, FOREIGN)
    for key, value in root.value:
        if key.value not in SECTIONS:
            continue
        entries = values[key.value]
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for node, entry in zip(nodes, entries if isinstance(entries, list) else [entries], strict=True):
            if isinstance(node, yaml.MappingNode) and isinstance(entry, dict):
                yield from _in_mapping(node, entry, FOREIGN_OF_DATASETS)


def _in_mapping(node: yaml.Node, values: dict[str, object], known: Mapping[str, Fate]) -> Iterator[_Key]:
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in known:
            yield _Key(key.value, known[key.value], key, value, values)


def _changed(text: str, found: _Key) -> tuple[str, str]:
    """The text with this key changed, and what was done."""
    value, fate = found.values[found.name], found.fate
    if is_off(value):
        return _commented(text, found, "asks for nothing")
    if isinstance(fate, Note):
        return _commented(text, found, fate.sentence)
    if not isinstance(fate, Translation):
        return _commented(text, found, f"cannot be had: {fate.sentence}")
    if not is_off(found.values.get(fate.key)):
        return _commented(text, found, f"{fate.key} says it already")
    begin = found.value.start_mark.index
    end = begin + len(text[begin : found.value.end_mark.index].rstrip())
    written = text[begin:end] if fate.value is None else str(fate.value_of(value))
    start = found.key.start_mark.index
    return f"{text[:start]}{fate.key}: {written}{text[end:]}", f"{found.name} is now {fate.key}: {written}"


def _commented(text: str, found: _Key, why: str) -> tuple[str, str]:
    """The lines of the key as comments, where lines can be: not inside {..}, nor behind a dash."""
    lines = text.splitlines(keepends=True)
    first, after = found.key.start_mark.line, found.value.end_mark.line + (found.value.end_mark.column > 0)
    after = max(after, first + 1)
    indent = lines[first][: found.key.start_mark.column]
    if indent.strip():
        return text, f"{found.name}: {why}; take it out by hand"
    while after > first + 1 and not lines[after - 1].strip():  # what is blank behind it stays
        after -= 1
    commented = [f"{indent}# {line[len(indent) :]}" if line.strip() else line for line in lines[first:after]]
    lines[first:after] = [f"{indent}# {why}:\n", *commented]
    return "".join(lines), f"{found.name}: {why}"
