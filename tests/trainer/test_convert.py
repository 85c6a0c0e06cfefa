"""`fastlora convert-config`: an Axolotl file becomes one that is valid here, the rest of it untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pyfastlora.cli.convert_config import convert_config
from pyfastlora.trainer.config.convert import convert
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.errors import ConfigError

from . import axolotl_keys

OLD = """\
# my run
base_model: NousResearch/Llama-2-7b-hf   # the base
model_type: LlamaForCausalLM
load_in_8bit: false

datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
    train_on_split: validation
  - {path: other.jsonl, type: alpaca, train_on_split: test}
adapter: lora
lora_target_linear: true
noisy_embedding_alpha:   5.0  # noise
learning_rate: 0.0002
flash_attention: true
s2_attention:
max_memory:
  fsdp_offload_params: true
  # inside
  other: 1

comet_project_name: mine
"""
NEW = """\
# my run
base_model: NousResearch/Llama-2-7b-hf   # the base
# the class is read from the files of base_model:
# model_type: LlamaForCausalLM
load_in_8bit: false

datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
    split: validation
  - {path: other.jsonl, type: alpaca, split: test}
adapter: lora
lora_target_linear: true
neftune_noise_alpha: 5.0  # noise
learning_rate: 0.0002
attn_implementation: flash_attention_2
# asks for nothing:
# s2_attention:
# cannot be had: the model goes to one device; remove the key:
# max_memory:
#   fsdp_offload_params: true
#   # inside
#   other: 1

# cannot be had: those that can be told are TensorBoard, wandb, MLflow and Trackio; remove the key:
# comet_project_name: mine
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old.yaml").write_text(OLD)
    return tmp_path / "old.yaml"


def test_keys_are_renamed_and_the_rest_stays(old, tmp_path):
    result = CliRunner().invoke(convert_config, [str(old), "-o", str(tmp_path / "new.yaml")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new.yaml").read_text() == NEW and old.read_text() == OLD
    assert f"{old}:13:1: noisy_embedding_alpha is now neftune_noise_alpha: 5.0" in result.stderr
    loaded = load_config(tmp_path / "new.yaml")
    assert loaded.notes == () and loaded.config.datasets[0].split == "validation"
    assert convert(tmp_path / "new.yaml").text == NEW  # once is enough


def test_it_goes_to_stdout_and_overwrites_nothing(old):
    result = CliRunner().invoke(convert_config, [str(old)])
    assert result.stdout == NEW
    refused = CliRunner().invoke(convert_config, [str(old), "-o", str(old)])
    assert refused.exit_code == 2 and "is there already" in refused.stderr and old.read_text() == OLD


def test_what_is_still_wrong_is_said(old):
    old.write_text(OLD + "lora_rr: 3\n")
    result = CliRunner().invoke(convert_config, [str(old)])
    assert result.exit_code == 2 and "lora_rr: unknown key; did you mean lora_r?" in result.stderr


def test_what_cannot_be_cut_out_is_left_and_told(old):
    text = "base_model: m\ndatasets:\n  - conversation: vicuna\n    path: x\n    type: sharegpt\n"
    old.write_text(text)
    found = convert(old)
    assert found.text == text and found.changes[0].endswith("; take it out by hand")


def test_every_key_of_axolotls_converts_to_something_valid(tmp_path):
    """All of them in one file, as nobody writes it: what is left has no unknown and no refused key."""
    lines = {key: f"{key}: {value}\n" for key, value, _, _ in axolotl_keys.table() if key != "base_config"}
    (tmp_path / "all.yaml").write_text("".join(lines.values()))
    converted = convert(tmp_path / "all.yaml")
    (tmp_path / "new.yaml").write_text(converted.text)
    with pytest.raises(ConfigError) as error:  # bf16 beside fp16, load_in_8bit beside load_in_4bit, ..
        load_config(tmp_path / "new.yaml")
    assert "unknown key" not in str(error.value) and "cannot be had" not in str(error.value)
    assert len(converted.changes) == sum(fate != "honoured" for _, _, fate, _ in axolotl_keys.table())


def test_a_list_that_becomes_a_word(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("fsdp:\n  - full_shard\n  - offload\nlora_r: 8\n")
    converted = convert(path)
    assert converted.text == "strategy: fsdp2_offload\nlora_r: 8\n"
