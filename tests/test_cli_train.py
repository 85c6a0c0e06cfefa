"""Mistakes with `fastlora train`: each is one sentence on stderr and an exit code, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pyfastlora.cli._flags import as_overrides
from pyfastlora.cli.schema import schema
from pyfastlora.cli.train import train

GOOD = '{"instruction": "greet", "output": "hello"}\n'


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(alphabet))).save_pretrained(folder)
    return folder


class Place:
    """A folder with a good configuration, good data and a good model, to break one thing at a time."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        (root / "data.jsonl").write_text(GOOD * 8)
        shutil.copytree(model, root / "model")
        self.config = root / "cfg.yaml"
        self.config.write_text(
            "base_model: ./model\n"
            "datasets:\n"
            "  - path: data.jsonl\n"
            "    type: alpaca\n"
            "adapter: lora\n"
            "lora_target_linear: true\n"
            "learning_rate: 1e-3\n"
            "max_steps: 1\n"
            "bf16: false\n"
            "output_dir: out\n"
        )

    def add(self, yaml: str) -> None:
        with self.config.open("a") as file:
            file.write(yaml + "\n")

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(train, ["cfg.yaml", *arguments])

    def files(self) -> dict[str, bytes | None]:
        return {
            str(p.relative_to(self.root)): p.read_bytes() if p.is_file() else None
            for p in self.root.rglob("*")
        }


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, model)


def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )


MISTAKES = {
    "no config": (lambda p: p.config.unlink(), 2, "cfg.yaml: no such file"),
    "config is a folder": (lambda p: (p.config.unlink(), p.config.mkdir()), 2, "'cfg.yaml' is a directory"),
    "unknown key": (
        lambda p: p.add("micro_batchsize: 2"),
        2,
        "cfg.yaml:11:1: micro_batchsize: unknown key; did you mean micro_batch_size?",
    ),
    "wrong type": (
        lambda p: p.add("lora_r: sixteen"),
        2,
        'cfg.yaml:11:1: lora_r must be a whole number; got "sixteen"',
    ),
    "not yaml": (lambda p: p.add("a: ["), 2, "cfg.yaml:12:1: not YAML: "),
    "twice": (lambda p: p.add("adapter: lora"), 2, "cfg.yaml:11:1: adapter: given twice (first on line 5)"),
    "no data": (
        lambda p: (p.root / "data.jsonl").unlink(),
        3,
        "datasets[0].path: data.jsonl: no such file or folder (looked in",
    ),
    "malformed row": (
        lambda p: (p.root / "data.jsonl").write_text(GOOD + '{"instruction": "a", \n'),
        3,
        "data.jsonl:2: not JSON: ",
    ),
    "wrong fields": (
        lambda p: (p.root / "data.jsonl").write_text(GOOD * 2 + '{"prompt": "a", "reply": "b"}\n'),
        3,
        'data.jsonl:3: type alpaca needs "instruction" and "output"; this row has "prompt", "reply"',
    ),
    "empty data": (
        lambda p: (p.root / "data.jsonl").write_text("\n"),
        3,
        "datasets[0].path: data.jsonl has no rows",
    ),
    "nothing fits": (
        lambda p: p.add("sequence_len: 16"),
        3,
        "datasets[0].path: data.jsonl: none of 8 rows fits sequence_len: 16 (the longest has ",
    ),
    "all held out": (
        lambda p: p.add("val_set_size: 8"),
        3,
        "val_set_size: 8 of 8 samples leaves nothing to train on",
    ),
    "used output": (
        lambda p: ((p.root / "out").mkdir(), (p.root / "out" / "notes.txt").write_text("keep")),
        2,
        "output_dir: out is not empty (it holds notes.txt); choose another output_dir, or empty it",
    ),
    "output is a file": (
        lambda p: (p.root / "out").write_text("keep"),
        2,
        "output_dir: out cannot be written: File exists",
    ),
    "output below a file": (
        lambda p: p.config.write_text(p.config.read_text().replace("dir: out", "dir: data.jsonl/out")),
        2,
        "output_dir: data.jsonl/out cannot be written: Not a directory",
    ),
    "no model": (
        lambda p: shutil.rmtree(p.root / "model"),
        1,
        "base_model: ./model: no such folder (looked in",
    ),
    "model is a file": (
        lambda p: (shutil.rmtree(p.root / "model"), (p.root / "model").write_text("")),
        1,
        "base_model: ./model is a file; give the folder that holds the model",
    ),
    "no weights": (
        lambda p: (p.root / "model" / "model.safetensors").unlink(),
        1,
        "base_model: ./model has no weights (model.safetensors or pytorch_model.bin); it holds config.json",
    ),
    "no config.json": (
        lambda p: (p.root / "model" / "config.json").unlink(),
        1,
        "base_model: ./model has no config.json; it holds ",
    ),
    "broken weights": (
        lambda p: (p.root / "model" / "model.safetensors").write_bytes(b"x" * 100),
        1,
        "base_model: ./model cannot be loaded: ",
    ),
    "no tokenizer": (
        lambda p: (p.root / "model" / "tokenizer.json").unlink(),
        1,
        "base_model: no tokenizer can be loaded from ./model: ",
    ),
    "no such target": (
        lambda p: p.add("lora_target_modules: [q_porj]"),
        2,
        "lora_target_modules: the model has no module called q_porj; did you mean q_proj?",
    ),
    "no target matches": (
        lambda p: p.config.write_text(
            p.config.read_text().replace("lora_target_linear: true", "lora_target_modules: layer.*7")
        ),
        2,
        "lora_target_modules: no module of ./model matches 'layer.*7'",
    ),
    "no such module to save": (
        lambda p: p.add("lora_modules_to_save: [extra]"),
        2,
        "lora_modules_to_save: the model has no module called extra; linear modules are down_proj, ",
    ),
    "untrained tokens": (
        lambda p: p.add("tokens: [one, two]\nlora_modules_to_save: [lm_head]"),
        2,
        "the tokenizer has 260 tokens, ./model has embeddings for 258; add embed_tokens",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(place, name):
    break_it, exit_code, sentence = MISTAKES[name]
    break_it(place)
    before = place.files()
    result = place.run()
    assert sentence in result.stderr and result.exit_code == exit_code, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    assert place.files() == before


def test_several_mistakes_are_told_together(place):
    place.add("lora_r: 0\nmicro_batchsize: 2")
    assert place.run().stderr == (
        "Error: cfg.yaml:11:1: lora_r must be greater than 0; got 0\n"
        "cfg.yaml:12:1: micro_batchsize: unknown key; did you mean micro_batch_size? (optimisation keys)\n"
    )


def test_set_is_checked_like_the_file(place):
    result = place.run("--set", "lora_r=x")
    assert result.exit_code == 2 and result.stderr == 'Error: --set: lora_r must be a whole number; got "x"\n'


def test_qlora_without_bitsandbytes(place, monkeypatch):
    no_bitsandbytes(monkeypatch)
    result = place.run("--set", "adapter=qlora")
    assert result.exit_code == 1
    assert result.stderr == 'Error: adapter: qlora needs bitsandbytes: pip install "pyfastlora[qlora]"\n'


def test_optimizer_without_bitsandbytes(place, monkeypatch):
    no_bitsandbytes(monkeypatch)
    result = place.run("--set", "optimizer=paged_adamw_8bit")
    assert result.exit_code == 1 and "optimizer: paged_adamw_8bit needs bitsandbytes" in result.stderr


def test_4bit_rows_on_a_cpu(place):
    pytest.importorskip("bitsandbytes")
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    result = place.run("--set", "adapter=qlora")
    assert result.exit_code == 1 and not (place.root / "out").exists()
    assert "on a CPU, 4-bit weights need inputs in multiples of 64; model.layers.0." in result.stderr


def test_fp16_on_a_cpu(place):
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    result = place.run("--set", "fp16=true")
    assert result.exit_code == 1 and "fp16: true needs a GPU" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_read_only_folder(place):
    (place.root / "locked").mkdir(mode=0o500)
    result = place.run("--set", "output_dir=locked/out")
    assert (
        result.exit_code == 2
        and "output_dir: locked/out cannot be written: Permission denied" in result.stderr
    )


def test_a_loss_that_is_not_finite_stops_the_run(place):
    result = place.run("--set", "learning_rate=1e30", "--set", "max_steps=5", "--set", "fastlora=false")
    assert result.exit_code == 1 and "Error: the loss is nan at step" in result.stderr
    assert not (place.root / "out" / "adapter_model.safetensors").exists()
    assert '"loss": "nan"' in (place.root / "out" / "log.jsonl").read_text()


def test_a_backend_that_cannot_be_had_is_named_with_its_reasons(place):
    import torch

    import pyfastlora

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pyfastlora.backend("gpu"):
        result = place.run()
    assert result.exit_code == 1 and "`gpu` was requested and cannot take cpu" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_backend_that_does_not_exist_is_named():
    environment = {**os.environ, "FASTLORA_BACKEND": "quick"}
    code = "from pyfastlora.trainer.job import _backend_requests_checked as c\nwith c(): pass"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ConfigError: FASTLORA_BACKEND: backend 'quick' in 'quick': choose one of auto, gpu" in done.stderr


def test_waiting_threads_give_way_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    CliRunner().invoke(train, ["nowhere.yaml"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    CliRunner().invoke(train, ["nowhere.yaml"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_a_command_line_without_a_file():
    result = CliRunner().invoke(train, [])
    assert result.exit_code == 2 and "Missing argument 'CONFIG'" in result.stderr


def test_keys_as_options(place: Place) -> None:
    """Of several, the wrong ones are told together, as with --set."""
    result = place.run(
        "--learning-rate", "fast", "--lora-r=0", "--datasets.0.typ", "alpaca", "--max_steps", "2"
    )
    assert result.exit_code == 2
    assert set(result.stderr.removeprefix("Error: ").splitlines()) == {
        '--set: learning_rate must be a number; got "fast"',
        "--set: lora_r must be greater than 0; got 0",
        "--set: datasets[0].typ: unknown key; did you mean type?",
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other.yaml"], "other.yaml: one configuration is trained at a time; keys are --key value"),
        (["--lora-r"], "--lora-r needs a value, such as --lora-r true"),
        (["--lora-r", "--max-steps", "2"], "--lora-r needs a value, such as --lora-r true"),
    ],
)
def test_what_is_no_key(place: Place, arguments: list[str], sentence: str) -> None:
    before = place.files()
    result = place.run(*arguments)
    assert result.exit_code == 2 and result.stderr.rstrip().endswith(f"Error: {sentence}")
    assert place.files() == before


def test_a_negative_number_is_a_value() -> None:
    assert as_overrides(["--seed", "-1", "--val-set-size=0.5", "--lora-dropout", "0"]) == [
        "seed=-1",
        "val_set_size=0.5",
        "lora_dropout=0",
    ]


def test_schema_of_all_keys_and_of_one() -> None:
    whole = json.loads(CliRunner().invoke(schema, []).stdout)
    assert {"base_model", "lora_r", "datasets"} <= set(whole["properties"])
    assert whole["required"] == ["base_model", "learning_rate"]
    one = json.loads(CliRunner().invoke(schema, ["--field", "lora_r"]).stdout)
    assert one == whole["properties"]["lora_r"] and one["exclusiveMinimum"] == 0
    wrong = CliRunner().invoke(schema, ["--field", "lora_rr"])
    assert wrong.exit_code == 2 and "--field lora_rr: unknown key; did you mean lora_r?" in wrong.stderr
