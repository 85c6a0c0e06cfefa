"""YAML reading: 1.2 scalars, lines, duplicates, and files that are meant to do harm."""

from __future__ import annotations

import math

import pytest

from pyfastlora.trainer.config.yaml_lines import parse, written
from pyfastlora.trainer.errors import ConfigError


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("2e5", 2e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("", None),
        ("~", None),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(text, value):
    found = parse(f"key: {text}", "cfg.yaml").values["key"]
    assert found == value and type(found) is type(value)


def test_infinity_and_nan():
    values = parse("a: -.inf\nb: .nan", "cfg.yaml").values
    assert values["a"] == -math.inf and math.isnan(values["b"])


def test_every_value_has_its_place():
    places = parse("a: 1\nb:\n  - x\n  - k: v\n    l: w\n", "cfg.yaml").places
    assert [places[p][:2] for p in (("a",), ("b", 0), ("b", 1, "l"))] == [(1, 1), (3, 5), (5, 5)]


def test_merge_keys_do_not_override_what_is_written():
    values = parse("base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  x: 3\n", "cfg.yaml").values
    assert values["mine"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: 1\nb: 2\na: 3\n", "cfg.yaml:3:1: a: given twice (first on line 1)"),
        ("a: {x: 1, x: 2}", "cfg.yaml:1:11: x: given twice (first on line 1)"),
        ("1: 2", "cfg.yaml:1:1: a key must be text; got '1'"),
        ("a: 1\n b: 2", "cfg.yaml:2:3: not YAML: mapping values are not allowed here"),
        ("\t- a", "cfg.yaml:1:1: not YAML: found character '\\t' that cannot start any token"),
        ("a: &x [*x]", "cfg.yaml:1:4: an alias contains itself"),
        ("a: *nowhere", "cfg.yaml:1:4: not YAML: found undefined alias 'nowhere'"),
        ("a: !!python/object/apply:os.system ['true']", "cfg.yaml:1:4: tags are not read here"),
        ("a: !mine b", "cfg.yaml:1:4: not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "cfg.yaml: not YAML: special characters are not allowed"),
        ("a: " + "9" * 5000, "cfg.yaml:1:4: cannot be read"),
    ],
)
def test_one_sentence_for_what_cannot_be_read(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse(text, "cfg.yaml")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_aliases_cannot_explode():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="aliases expand this file to more than 100000 values"):
        parse("\n".join(levels), "cfg.yaml")


def test_what_is_written_is_read_again():
    for text in ("a/b-1.x", "with space: and #", 'quo"te', "naïve", "true", "1e-4", "null", "~", "", "- a"):
        assert parse(f"key: {written(text)}", "x").values == {"key": text}
    assert written("./data/train.jsonl") == "./data/train.jsonl"
