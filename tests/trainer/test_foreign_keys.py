"""Axolotl's own keys: none is unknown, each has the fate of the table, and one sentence says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyfastlora.trainer.config import Config, DatasetKeys
from pyfastlora.trainer.config.foreign import FOREIGN, Refusal, Translation
from pyfastlora.trainer.errors import ConfigError

from . import axolotl_keys
from .test_config import GOOD


def check_fate(load: Callable[..., Any], text: str, at: str, key: str, fate: str, to: str) -> None:
    """A file whose only foreign key stands in the mapping `at`: what is said of it is what its fate wants."""
    problems, notes = "", ()
    try:
        notes = load(text).notes
    except ConfigError as error:
        problems = str(error)
    if fate == "refused":
        assert f": {at}{key}: " in problems and "cannot be had: " in problems
    elif fate == "noted":
        assert not problems and len(notes) == 1 and notes[0].startswith(f"{at}{key}: ")
    elif fate == "translated":
        assert not problems and notes[0].startswith(f"{at}{key}: read as {to}: ")
    else:
        assert "unknown key" not in problems and "cannot be had" not in problems and not notes


def test_foreign_keys_are_none_of_ours():
    assert not set(FOREIGN) & set(Config.model_fields)
    assert {fate.key for fate in FOREIGN.values() if isinstance(fate, Translation)} <= set(
        Config.model_fields
    )


@pytest.mark.parametrize(("key", "value", "fate", "to"), axolotl_keys.table(), ids=lambda v: str(v)[:24])
def test_every_key_of_axolotls_has_its_fate(load, key, value, fate, to):
    Path("other.yaml").write_text("lora_r: 4\n")
    others = yaml.safe_dump({k: v for k, v in yaml.safe_load(GOOD).items() if k != key})
    check_fate(load, f"{others}{key}: {value}\n", "", key, fate, to)
    assert fate != "honoured" or key in Config.model_fields


@pytest.mark.parametrize(("key", "value", "fate", "to"), axolotl_keys.table(axolotl_keys.OF_DATASETS))
def test_every_key_of_a_dataset_has_its_fate(load, key, value, fate, to):
    entry = {k: v for k, v in {"path": "data.jsonl", "type": "chat_template"}.items() if k != key}
    text = yaml.safe_dump({**yaml.safe_load(GOOD), "datasets": [entry]}).replace(
        "- ", f"- {key}: {value}\n  ", 1
    )
    check_fate(load, text, "datasets[0].", key, fate, to)
    assert fate != "honoured" or key in DatasetKeys.model_fields


@pytest.mark.parametrize("value", ["", "false", "no", "[]", "0"])
def test_foreign_keys_that_ask_for_nothing_are_accepted(load, value):
    refused = [key for key, fate in FOREIGN.items() if isinstance(fate, Refusal)]
    assert load(GOOD + "".join(f"{key}: {value}\n" for key in refused)).notes == ()


def test_explained_keys_leave_a_note(load):
    assert any(n.startswith("lora_mlp_kernel: ") for n in load(GOOD + "lora_mlp_kernel: true\n").notes)


def test_a_key_that_is_said_twice_in_two_ways(mistakes):
    assert mistakes(GOOD + "attn_implementation: eager\nflash_attention: true\n") == [
        "cfg.yaml:9:1: flash_attention and attn_implementation say the same in two ways; "
        "keep attn_implementation"
    ]


def test_foreign_keys_of_a_dataset(load, mistakes):
    text = GOOD.replace("type: alpaca", "type: alpaca\n    train_on_split: validation")
    loaded = load(text)
    assert loaded.config.datasets[0].split == "validation"
    assert loaded.notes == ('datasets[0].train_on_split: read as split: "validation"',)
    text = GOOD.replace("type: alpaca", "type: sharegpt\n    train_on_eot: last")
    assert load(text).config.datasets[0].train_on_eos == "last"
    text = GOOD.replace("type: alpaca", "type: sharegpt\n    conversation: vicuna_v1.1")
    assert mistakes(text) == [
        'cfg.yaml:5:5: datasets[0].conversation: "vicuna_v1.1" cannot be had: '
        "say chat_template: chatml, or chat_template: jinja and its text"
    ]
