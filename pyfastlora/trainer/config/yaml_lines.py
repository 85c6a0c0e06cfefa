"""YAML with the place of every value, numbers as in YAML 1.2, and no duplicate keys.

PyYAML reads YAML 1.1, where 1e-4 is text, `no` is false and 12:30 is 750. Whoever writes a configuration
means the 1.2 reading, so this loader resolves plain scalars by 1.2's core rules; the rest is the safe loader.
`${env:NAME}` inside a value is the environment variable, and the only way in which one gets there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import yaml

from pyfastlora.trainer.errors import ConfigError

Path = tuple[str | int, ...]

# Aliases may repeat a value; a file of a few hundred bytes can expand to gigabytes that way.
MOST_VALUES = 100_000


class Place(NamedTuple):
    """Where a value was written; line and column count from 1."""

    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}"

    @classmethod
    def of(cls, node: yaml.Node, name: str) -> Place:
        """The beginning of a node."""
        return cls(node.start_mark.line + 1, node.start_mark.column + 1, name)


@dataclass(frozen=True)
class LocatedValues:
    """The plain values of a YAML document, and where each was written.

    values is what yaml.safe_load would give under YAML 1.2's scalar rules; places maps the path of each
    value, for instance ("datasets", 0, "path"), to where its key is.
    """

    values: Any
    places: dict[Path, Place]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first.replace("\0", "")))
_Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile(r"^$")))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # 1.1 would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, name: str) -> LocatedValues:
    """The values of one YAML document and their places; `name` is the file as the user wrote it.

    Raises ConfigError for text that is not YAML, for a duplicate key, a key that is not text, an alias that
    contains itself, and a file that expands to more than MOST_VALUES values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, name)
        values = None if node is None else reader.read(node, ())
    except yaml.YAMLError as error:
        raise ConfigError(_describe(error, name)) from None
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return LocatedValues(values, reader.places)


def compose(text: str) -> yaml.Node:
    """The nodes of one YAML document that `parse` has taken, with their marks in the text."""
    node = _Loader(text).get_single_node()
    assert node is not None
    return node


def parse_scalar(text: str, name: str) -> Any:
    """One value as it would be read behind `key:` in a file; `name` says where it came from."""
    return parse(text, name).values


def written(text: str) -> str:
    """Text as a YAML scalar, quoted where it would be something else."""
    plain = re.fullmatch(r"[\w./~][\w./~-]*", text) and isinstance(parse(f"a: {text}", "").values["a"], str)
    return text if plain else json.dumps(text, ensure_ascii=False)


@dataclass
class _Reader:
    """Turns composed nodes into values, remembering places."""

    loader: _Loader
    name: str
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)
    _count: int = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        place = Place.of(node, self.name)
        self.places.setdefault(path, place)
        self._count += 1
        if self._count > MOST_VALUES:
            raise ConfigError(f"{self.name}: aliases expand this file to more than {MOST_VALUES} values")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise ConfigError(f"{place}: tags are not read here; got {node.tag}")
        if id(node) in self._open:
            raise ConfigError(f"{place}: an alias contains itself")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if "${env:" in node.value:
            self._fill_in(node)
        try:
            return self.loader.construct_object(node)
        except ValueError:  # for instance a number of more digits than Python converts
            place = Place.of(node, self.name)
            raise ConfigError(f"{place}: cannot be read: {node.value[:40]!r}") from None

    def _fill_in(self, node: yaml.ScalarNode) -> None:
        """Put environment variables where ${env:NAME} asks for them; plain text may become a number then."""

        def value(match: re.Match[str]) -> str:
            if match[1] not in os.environ:
                self.problems.append(
                    f"{Place.of(node, self.name)}: {match[0]}: the environment has no {match[1]}"
                )
            return os.environ.get(match[1], "")

        node.value = re.sub(r"\$\{env:([^}]*)\}", value, node.value)
        if node.style is None:
            node.tag = self.loader.resolve(yaml.ScalarNode, node.value, (True, False))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node, merged in _pairs(node):
            place = Place.of(key_node, self.name)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                found = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a collection"
                self.problems.append(f"{place}: a key must be text; got {found}")
                continue
            if key in values:
                if not merged:  # what a merge brings never overrides what is written out
                    first = self.places[(*path, key)].line
                    self.problems.append(f"{place}: {key}: given twice (first on line {first})")
                continue
            self.places[(*path, key)] = place
            values[key] = self.read(value_node, (*path, key))
        return values


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
    """Key and value nodes, those of `<<:` merges last."""
    merges: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            merges += value.value if isinstance(value, yaml.SequenceNode) else [value]
        else:
            yield key, value, False
    for merge in merges:
        if not isinstance(merge, yaml.MappingNode):
            raise yaml.composer.ComposerError(None, None, "<<: needs a mapping", merge.start_mark)
        for key, value, _ in _pairs(merge):
            yield key, value, True


def _describe(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = name if mark is None else str(Place(mark.line + 1, mark.column + 1, name))
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{where}: not YAML: {what}" + (f" ({context})" if context else "")
