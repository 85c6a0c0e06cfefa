"""README.md beside the adapter: the facts of the run, a header that the hub reads, and code that runs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pyfastlora.trainer import job
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.model_card import MARK, card
from pyfastlora.trainer.report.facts import Facts


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    extra = "val_set_size: 4\neval_on_start: true\neval_steps: 3\nfastlora: false\n"
    return config_file(write_jsonl(alpaca_rows, "a|b.jsonl"), extra)


def run(config: Path, *overrides: str, resume: str | None = None) -> Path:
    job.train(load_config(config, overrides), Console(io.StringIO()), resume, resume_anyway=True)
    return config.parent / "out"


def loaded(card: str) -> dict[str, Any]:
    """What the card's own code makes."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    made: dict[str, Any] = {}
    exec(code, made)
    return made


@pytest.mark.parametrize("adapter", ["lora", "qlora", ""])
def test_the_card_of_a_run(config, adapter):
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    given = ["peft_use_dora=true"] if adapter else ["lora_r=8", "lora_alpha=8", "lora_target_linear=false"]
    out = run(config, f"adapter={adapter}", "weight_decay=0.25", *given)
    text = (out / "README.md").read_text()
    header = ModelCard(text).data
    # the base is a folder, of which the hub knows nothing
    assert header.base_model is None and header.pipeline_tag == "text-generation"
    assert header.library_name == ("peft" if adapter else "transformers")
    wanted = {"pyfastlora"} | ({"lora", "dora", adapter} if adapter else set())
    assert set(header.tags) == wanted and "More Information Needed" not in text

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    records = [x for x in lines if x["event"] == "train"]
    held_out = {x["step"]: x["eval_loss"] for x in lines if x["event"] == "eval"}
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M))
    assert rows["last training loss"] == f"{records[-1]['loss']:.4f} per trained token"
    assert all(f"{held_out[step]:.4f} at step {step}" in rows["held-out loss"] for step in (0, 6))
    tokens, trained = (sum(x[key] for x in records) for key in ("tokens", "trained_tokens"))
    assert rows["tokens"] == f"{tokens:,}, of which {trained:,} were trained on"
    assert rows["steps"].startswith("6, ") and rows["`weight_decay`"] == "`0.25`"
    assert rows["`learning_rate`"] == "`0.01`" and "`output_dir`" not in rows
    assert "a\\|b.jsonl` | 24 | " in text and "20 samples trained on, 4 held out." in text
    assert rows["torch"] == torch.__version__ and rows["processes"] == "1, single"

    made = loaded(text)
    assert len(made["tokenizer"]) == 384
    names = "lora_B" if adapter else "q_proj"
    saved = load_file(out / f"{'adapter_model' if adapter else 'model'}.safetensors")
    held = {n.replace(".default", ""): p for n, p in made["model"].named_parameters() if names in n}
    assert held and all(p.equal(saved[n]) and p.abs().sum() > 0 for n, p in held.items())


def test_a_card_of_the_users_stays(config):
    """One that was made here is made again where the run goes on; one that a user wrote is not touched."""
    settings = ("save_strategy=steps", "save_steps=3")
    out = run(config, *settings, "max_steps=3")
    assert MARK in (out / "README.md").read_text()
    (out / "README.md").write_text("# Mine\n\n| steps | many |\n")
    run(config, *settings, "max_steps=6", resume="auto")
    assert (out / "README.md").read_text() == "# Mine\n\n| steps | many |\n"
    (out / "README.md").write_text(f"---\n---\n{MARK}\nold")
    run(config, *settings, "max_steps=7", resume="auto")
    assert "| steps | 7, " in (out / "README.md").read_text()


def test_a_result_that_is_not_the_last_step(config):
    out = run(config, "max_steps=3", "eval_on_start=false")
    log = out / "log.jsonl"
    assert "| weights |" not in card(Facts.read(out))
    lines = log.read_text().splitlines()
    end = json.loads(lines[-1]) | {"weights_of": "checkpoint-2"}
    middle = {"event": "eval", "time": end["time"], "step": 2, "eval_loss": 0.5}
    log.write_text("\n".join([*lines[:-2], json.dumps(middle), lines[-2], json.dumps(end)]))
    text = card(Facts.read(out))
    assert "| weights | of checkpoint-2, which had the lowest held-out loss |" in text
    assert re.search(r"\| held-out loss \| 0.5000 at step 2, \d.\d+ at step 3 \|", text)
