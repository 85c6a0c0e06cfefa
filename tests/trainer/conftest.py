"""A tokenizer trained here, a tiny Llama with random weights, and a dataset it can learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response: the fox says hello to the lazy dog, 你好 and naïve café.",
] * 4


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(bos=True, eos=True): byte-level BPE; bos: it opens every text with <s> by itself."""

    def make(bos: bool = True, eos: bool = True) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            TEXT,
            trainers.BpeTrainer(
                vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
            ),
        )
        if bos:
            bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        special = {"bos_token": "<s>"} if bos else {}
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            **special,
            **({"eos_token": "</s>"} if eos else {}),
            clean_up_tokenization_spaces=False,
        )

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Any]) -> Path:
    """A folder with a two-layer Llama and its tokenizer; widths are multiples of 64, as 4-bit needs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=384,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def prepared_data_in_a_folder_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the user's cache, where kernels stay."""
    from pyfastlora.trainer.data import store

    real = store.folders

    def folders(config: Any) -> list[Path]:
        return real(config) if config.dataset_prepared_path else [tmp_path / "prepared_data"]

    monkeypatch.setattr(store, "folders", folders)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(rows, name="data.jsonl"): one line per row; a row that is text is written as it is."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def alpaca_rows() -> list[dict[str, str]]:
    """Twenty-four rows with one answer per instruction."""
    return [
        {"instruction": f"greet {n % 3}", "input": "loud" if n % 2 else "", "output": "hello " * (1 + n % 3)}
        for n in range(24)
    ]


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """config_file(data, extra): a small LoRA configuration on that data; `extra` is more YAML."""

    def write(data: Path, extra: str = "") -> Path:
        path = tmp_path / "cfg.yaml"
        path.write_text(
            f"base_model: {tiny_model}\n"
            f"datasets:\n  - path: {data}\n    type: alpaca\n"
            "adapter: lora\nlora_target_linear: true\nlora_r: 8\nlora_alpha: 16\n"
            "sequence_len: 256\nmicro_batch_size: 4\nlearning_rate: 1e-2\nbf16: false\n"
            f"max_steps: 6\nlr_scheduler: constant\nsave_strategy: no\noutput_dir: {tmp_path}/out\n"
            f"report_samples: 0\n{extra}"
        )
        return path

    return write


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """load(text, *overrides): the LoadedConfig of cfg.yaml with that text, in a folder of the test."""
    from pyfastlora.trainer.config.load import load_config

    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str) -> Any:
        Path("cfg.yaml").write_text(text)
        return load_config("cfg.yaml", overrides)

    return run


@pytest.fixture
def mistakes(load: Callable[..., Any]) -> Callable[..., list[str]]:
    """mistakes(text, *overrides): the sentences about a file that is refused."""
    from pyfastlora.trainer.errors import ConfigError

    def run(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load(text, *overrides)
        assert error.value.exit_code == 2
        return str(error.value).splitlines()

    return run
