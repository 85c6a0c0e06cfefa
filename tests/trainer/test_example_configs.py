"""The YAML files of examples/: each is valid, each is listed, and each trains a tiny model of its family."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyfastlora.cli.train import train
from pyfastlora.trainer.config import Config, DatasetKeys, TemplateKeys
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.data.chat import CHATML

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
#: Shorter than what the files say, and what a CPU and two layers can learn in ten steps.
SMALLER = {
    **{"max_steps": 10, "sequence_len": 192, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
    **{"logging_steps": 1, "learning_rate": 5e-3, "lr_scheduler": "constant", "lr_scheduler_kwargs": "{}"},
    **{"warmup_steps": "", "warmup_ratio": "", "attn_implementation": "", "bf16": "false"},
    **{"dataloader_num_workers": 0, "report_samples": 0},
}
FAMILIES = {"pythia": "gpt_neox", "phi-2": "phi", "gemma": "gemma2"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cluster.yaml asks for."""
    for name in ("MODELS", "SCRATCH"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture(scope="module")
def base_of(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]
) -> Callable[[str], Path]:
    """A folder with a tiny model of the family that a name stands for, and a chat template."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        family = next((f for part, f in FAMILIES.items() if part in name), "llama")
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_of_text|>"]})
            tokenizer.chat_template = "{{ tools | tojson if tools }}" + CHATML
            tokenizer.save_pretrained(made[family])
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 448}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **sizes, **heads, bos_token_id=0, eos_token_id=1)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[family])
        return made[family]

    return base


def row(entry: DatasetKeys, n: int) -> dict[str, Any]:
    """The n-th row that fits an entry."""
    ask, answer = f"greet {n % 3}", "hello " * (1 + n % 3)
    if isinstance(entry.type, TemplateKeys):
        keys = entry.type
        return {keys.field_instruction: ask, keys.field_input: "x" * (n % 2), keys.field_output: answer}
    if entry.type is None:
        ids = [0, *range(40 + n % 3, 60), 1]
        return {"input_ids": ids, "labels": ids}
    if entry.type == "completion":
        return {entry.field or "text": f"{ask} {answer}"}
    if entry.type == "input_output":
        return {"segments": [{"label": False, "text": ask}, {"label": True, "text": answer}]}
    if entry.type == "sharegpt":
        return {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
    if entry.type == "chat_template":
        names = entry.message_property_mappings
        role, content = names.get("role", "role"), names.get("content", "content")
        said = [{role: "user", content: ask}, {role: "assistant", content: answer}]
        if entry.message_field_training:
            said[1][entry.message_field_training] = True
        return {entry.field_messages or "messages": said} | (
            {entry.field_tools: TOOLS} if entry.field_tools else {}
        )
    return {
        "alpaca": {"instruction": ask, "output": answer},
        "alpaca_chat.load_qa": {"question": ask, "answer": answer},
        "alpaca_w_system.load_open_orca": {"system_prompt": "", "question": ask, "response": answer},
        "metharme": {"prompt": ask, "generation": answer},
    }[entry.type]


def with_data(config: Config, write_jsonl: Callable[..., Path]) -> dict[str, Any]:
    """Overrides that give every dataset a file with rows of its kind."""
    found: dict[str, Any] = {}
    for section in ("datasets", "test_datasets", "pretraining_dataset"):
        for i, given in enumerate(getattr(config, section)):
            entry = given.as_dataset() if section == "pretraining_dataset" else given
            rows = [row(entry, n) for n in range(100)]
            found[f"{section}[{i}].path"] = write_jsonl(rows, f"{section}{i}.jsonl")
            found[f"{section}[{i}].data_files"] = ""
            if section == "pretraining_dataset":
                found[f"{section}[{i}].skip"] = 3
    return found


def test_there_are_twenty_and_all_are_listed():
    listed = re.findall(r"^\| \[(\w+\.yaml)\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == [path.name for path in FILES] and len(FILES) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_valid(path):
    loaded = load_config(path)
    assert loaded.notes == () and loaded.text.startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trains(path, base_of, write_jsonl, tmp_path):
    config = load_config(path).config
    if config.adapter == "qlora" or config.load_in_8bit or "8bit" in config.optimizer:
        pytest.importorskip("bitsandbytes")
    changes = SMALLER | with_data(config, write_jsonl)
    if config.adapter:
        changes |= {"lora_r": 8, "lora_alpha": 16}
    changes |= {"base_model": base_of(config.base_model), "output_dir": tmp_path / "out"}
    if config.val_set_size >= 1:
        changes["val_set_size"] = 10
    if config.dataset_shard_num:
        changes["dataset_shard_num"] = 2
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(train, [str(path), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1
    assert any(line["event"] == "eval" for line in lines) == bool(config.val_set_size or config.test_datasets)
    saved = "adapter_model" if config.adapter else "model"
    assert (tmp_path / "out" / f"{saved}.safetensors").exists()
    if config.chat_template_jinja or config.chat_template == "chatml":
        template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        assert template == (config.chat_template_jinja or CHATML)
