"""`fastlora doctor`: what it finds, and that the job then does what it said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyfastlora.cli.doctor import doctor
from pyfastlora.trainer import doctor as checks
from pyfastlora.trainer.doctor import examine


@pytest.fixture
def config(config_file, write_jsonl, alpaca_rows) -> Path:
    return config_file(write_jsonl(alpaca_rows))


def found(config: Path, *overrides: str, level: str = "error") -> list[str]:
    findings = examine(str(config), overrides).findings
    return [f"{f.subject}: {f.sentence}" for f in findings if f.level == level]


def test_a_job_that_would_run(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(doctor, [str(config), "--lora-r", "4"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "parameters are trained" in result.stdout and "nothing stands in the way" in result.stdout
    assert "of the first 24 rows" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["base_model=./nowhere"], "base_model: base_model: ./nowhere: no such folder"),
        (["lora_target_modules=[q_porj]"], "the model has no module called q_porj; did you mean q_proj?"),
        (["fp16=true", "bf16=false"], "machine: fp16: true needs a GPU"),
        (["attn_implementation=flash_attention_2"], "attention: flash_attention_2 needs a GPU; say attn"),
        (["datasets[0].path=no.jsonl"], "datasets[0]: datasets[0].path: no.jsonl: no such file"),
        (["datasets[0].type=completion"], 'datasets[0]: {data}:1: type completion needs "text"'),
        (["sequence_len=3", "excess_length_strategy=raise"], "24 of the first 24 rows of {data} are longer"),
        (["tokens=[a_new_one]", "lora_modules_to_save=[lm_head]"], "the tokenizer has 385 tokens"),
    ],
)
def test_what_would_fail(config, write_jsonl, alpaca_rows, overrides, sentence):
    data = write_jsonl(alpaca_rows)
    errors = found(config, *overrides)
    assert any(sentence.format(data=data) in error for error in errors)
    assert examine(str(config), overrides).exit_code == 2


def test_every_mistake_of_the_file_is_told(config):
    config.write_text(config.read_text() + "lora_rr: 3\nseed: x\n")
    result = CliRunner().invoke(doctor, [str(config)], catch_exceptions=False)
    assert result.exit_code == 2 and "2 errors" in result.stdout
    assert "keys: " in result.stdout and ":19:1: seed must be a whole number" in result.stdout


def test_several_subjects_at_once(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    subjects = [e.partition(":")[0] for e in found(config, "base_model=./no", "datasets[0].path=no.jsonl")]
    assert subjects == ["output_dir", "base_model", "datasets[0]"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sequence_len=4096"], "base_model: sequence_len: 4096 is more than the 2048 positions"),
        (["sequence_len=8"], "24 of the first 24 rows of"),
        (["test_datasets=[{path: DATA, type: alpaca}]"], "test_datasets[0]: is datasets[0] as well"),
        (["sample_packing=true", "sequence_len=8192"], "make masks of 0.1 GiB each with sdpa"),
    ],
)
def test_what_would_run_and_is_hardly_meant(config, write_jsonl, alpaca_rows, overrides, sentence):
    data = write_jsonl(alpaca_rows)
    overrides = [o.replace("DATA", str(data)) for o in overrides]
    warnings = found(config, *overrides, level="warning")
    assert any(sentence in w for w in warnings)


def test_a_family_that_leaks_is_known_before_it_is_loaded(config, tiny_model, tmp_path):
    model = tmp_path / "falcon"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(json.dumps({"model_type": "falcon", "hidden_size": 64}))
    asked = [f"base_model={model}", "lora_target_linear=true"]
    assert "falcon does not keep" in " ".join(found(config, *asked, "sample_packing=true"))
    assert "falcon does not keep" in " ".join(found(config, *asked, "sample_packing=auto", level="warning"))


def test_the_hub_is_not_asked(config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    warnings = found(config, "base_model=some-one/some-model", level="warning")
    assert len(warnings) == 1 and "is not on this machine, and the hub was not asked" in warnings[0]
    assert "has rows with instruction, input, output" in " ".join(
        found(config, "base_model=some-one/some-model", level="note")
    )


def test_a_disk_without_room(config, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    assert "1 checkpoints" in found(config, "save_strategy=epoch")[0]


def test_4_bits_on_a_cpu(config, tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tmp_path / "narrow"
    shutil.copytree(tiny_model, model)
    facts = json.loads((model / "config.json").read_text()) | {"intermediate_size": 100}
    (model / "config.json").write_text(json.dumps(facts))
    errors = found(config, f"base_model={model}", "adapter=qlora")
    assert len(errors) == 1 and "multiples of 64; model.layers.0.mlp.down_proj" in errors[0]
