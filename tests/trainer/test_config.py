"""The configuration: what is read, what is refused, and that every mistake is named with its line at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.foreign import FOREIGN
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.config.reference import page
from pyfastlora.trainer.config.wording import sections
from pyfastlora.trainer.data.registry import CHATS, prompt_type_names
from pyfastlora.trainer.errors import ConfigError

GOOD = """\
base_model: ./model
datasets:
  - path: data.jsonl
    type: alpaca
adapter: lora
lora_target_linear: true
learning_rate: 1e-4
"""


def test_defaults_and_types(load):
    config = load(GOOD).config
    assert config.learning_rate == 1e-4 and config.bf16 == "auto" and config.fastlora is True
    assert config.datasets[0].split == "train" and config.output_dir == "./model-out"


def test_blank_keys_have_their_defaults(load):
    config = load(GOOD + "lora_dropout:\nval_set_size:\nspecial_tokens:\nwandb_project:\n").config
    assert config.lora_dropout == 0 and config.special_tokens.pad_token is None


def test_words_for_booleans(load):
    assert load(GOOD + "train_on_inputs: yes\nsave_strategy: no\n").config.train_on_inputs is True


def test_resolved_config_reads_back_the_same(load):
    config = load(
        GOOD + "adam_epsilon: 1e-8\nval_set_size: 0.1\nbf16: full\nspecial_tokens: {pad_token: x}\n"
    ).config
    again = load(yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)).config
    assert again == config


def test_all_mistakes_at_once_with_their_lines(mistakes):
    found = mistakes(
        GOOD
        + "micro_batchsize: 3\nlora_r: sixteen\nlora_alpha: true\nbf16: maybe\n"
        + "warmup_steps: 3\nwarmup_ratio: 0.1\n"
        + "max_steps: 0\nspecial_tokens: {padd_token: x}\n"
    )
    assert found == [
        "cfg.yaml:8:1: micro_batchsize: unknown key; did you mean micro_batch_size? (optimisation keys)",
        'cfg.yaml:9:1: lora_r must be a whole number; got "sixteen"',
        "cfg.yaml:10:1: lora_alpha must be a number; got true",
        'cfg.yaml:11:1: bf16 must be true, false, auto or full; got "maybe"',
        "cfg.yaml:12:1: warmup_steps and warmup_ratio say the same in two ways; keep one",
        "cfg.yaml:14:1: max_steps must be greater than 0; got 0",
        "cfg.yaml:15:18: special_tokens.padd_token: unknown key; did you mean pad_token?",
    ]


def test_missing_keys(mistakes):
    assert mistakes("datasets:\n  - pth: x\n    type: alpacca\nadapter: lora\n") == [
        "cfg.yaml: base_model: required key is missing",
        "cfg.yaml: learning_rate: required key is missing",
        "cfg.yaml:2:5: datasets[0].path: required key is missing",
        "cfg.yaml:2:5: datasets[0].pth: unknown key; did you mean path?",
        f"cfg.yaml:3:5: datasets[0].type must be one of {', '.join(prompt_type_names())}; got 'alpacca'; "
        "did you mean alpaca?",
        "cfg.yaml:4:1: nothing to adapt: set lora_target_linear: true, or list lora_target_modules",
    ]


@pytest.mark.parametrize(
    "extra, sentence",
    [
        (
            "load_in_4bit: true",
            "cfg.yaml:8:1: load_in_4bit: true goes with adapter: qlora; got adapter: lora",
        ),
        ("fp16: true\nbf16: true", "cfg.yaml:9:1: bf16 and fp16 exclude each other; keep one"),
        (
            "eval_steps: 5",
            "cfg.yaml:8:1: eval_steps needs data to evaluate: set val_set_size or test_datasets",
        ),
        ("val_set_size: 1.5", "val_set_size is a share below 1 or a whole number of samples; got 1.5"),
        (
            "save_steps: 5\nsaves_per_epoch: 2",
            "cfg.yaml:8:1: save_steps and saves_per_epoch say the same in two ways",
        ),
        ("save_strategy: steps", "cfg.yaml:8:1: save_strategy: steps needs save_steps or saves_per_epoch"),
        (
            "save_strategy: no\nsave_steps: 3",
            "cfg.yaml:9:1: save_steps goes with save_strategy: steps; got no",
        ),
        ("tokens: [a]", "add lora_modules_to_save: [embed_tokens, lm_head]"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}", "bnb_config_kwargs goes with adapter: qlora"),
        ("optimizer: adamw_hf", "optimizer: 'adamw_hf' no longer exists; adamw_torch takes its place"),
        ("optimizer: adamw_troch", "got 'adamw_troch'; did you mean adamw_torch?"),
        ("num_epochs: .inf", "cfg.yaml:8:1: num_epochs must be a finite number; got inf"),
        ("lora_dropout: 1", "cfg.yaml:8:1: lora_dropout must be less than 1; got 1"),
        ("seed: 1.5", "cfg.yaml:8:1: seed must be a whole number; got 1.5"),
        (
            "lora_target_modules: {a: b}",
            "must be a list of module names, or one regular expression; got a mapping",
        ),
        ("datasets: []", "cfg.yaml:8:1: datasets: given twice"),
        ("sample_packing: often", "cfg.yaml:8:1: sample_packing must be true, false or auto; got"),
        ("sample_packing: true\ngroup_by_length: true", "keep sample_packing or group_by_length"),
        ("eval_sample_packing: true", "eval_sample_packing: true goes with sample_packing: true"),
        ("chat_template: llama3", "must be tokenizer_default (the one that comes with the model), "),
        ("chat_template: chatlm", 'got "chatlm"; did you mean chatml?'),
        ("max_packed_sequence_len: 2048", "say sequence_len and sample_packing: true"),
    ],
)
def test_one_mistake(mistakes, extra, sentence):
    found = mistakes(GOOD + extra + "\n")
    assert len(found) == 1 and sentence in found[0]


STREAM = GOOD.replace("datasets:\n  - path: data.jsonl\n    type: alpaca", "pretraining_dataset: a.jsonl")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (STREAM, "cfg.yaml:2:1: max_steps is needed with pretraining_dataset, which is read as it is needed"),
        (
            STREAM + "max_steps: 5\nval_set_size: 0.1",
            "cfg.yaml:7:1: val_set_size does not go with pretrain",
        ),
        (STREAM + "max_steps: 5\nsaves_per_epoch: 2", "which is read as it is needed; say save_steps"),
        (STREAM + "max_steps: 5\ndatasets: [{path: a}]", "are both trained on; keep one"),
        (STREAM.replace("a.jsonl", "[{path: a, text_colum: b}]"), "unknown key; did you mean text_column?"),
        (STREAM.replace("a.jsonl", "[]"), "nothing to train on; give datasets, or text as pretraining_data"),
    ],
)
def test_mistakes_about_streams(mistakes, text, sentence):
    found = mistakes(text + "\n")
    assert len(found) == 1 and sentence in found[0], found


def test_a_stream_is_a_path_an_entry_or_a_list(load):
    for written in ("a.jsonl", "{path: a.jsonl}", "[{path: a.jsonl}]"):
        config = load(STREAM.replace("a.jsonl", written) + "max_steps: 5\n").config
        assert [entry.path for entry in config.pretraining_dataset] == ["a.jsonl"]


def test_4bit_contradiction_names_both_keys(mistakes):
    text = GOOD.replace("adapter: lora", "adapter: qlora") + "load_in_4bit: false\n"
    assert mistakes(text)[0].startswith(
        "cfg.yaml:8:1: adapter: qlora trains on 4-bit weights; remove load_in_4bit"
    )


def test_field_is_for_completion_only(mistakes):
    text = GOOD.replace("type: alpaca", "type: alpaca\n    field: body")
    assert mistakes(text) == ["cfg.yaml:5:5: field goes with type: completion; got type: alpaca"]


def test_strict_false_turns_unknown_keys_into_notes(load):
    loaded = load(GOOD + "strict: false\nlora_alpa: 3\n")
    assert loaded.notes == (
        "cfg.yaml:9:1: lora_alpa: unknown key; did you mean lora_alpha? (adapter keys) (ignored: strict is false)",  # noqa: E501
    )


def test_set_changes_values_by_path(load):
    config = load(
        GOOD,
        "learning_rate=2e-5",
        "datasets[0].path=b.jsonl",
        "datasets.0.type=completion",
        "special_tokens.pad_token=<pad>",
        "lora_target_modules=[q_proj, v_proj]",
    ).config
    assert config.learning_rate == 2e-5 and config.datasets[0].path == "b.jsonl"
    assert config.special_tokens.pad_token == "<pad>" and config.lora_target_modules == ["q_proj", "v_proj"]


def test_set_mistakes_are_named(mistakes):
    assert mistakes(GOOD, "lora_rr=3", "learning_rate=fast") == [
        '--set: learning_rate must be a number; got "fast"',
        "--set: lora_rr: unknown key; did you mean lora_r? (adapter keys)",
    ]
    assert "must be key=value" in mistakes(GOOD, "learning_rate")[0]
    assert mistakes(GOOD, "datasets[3].path=x") == ["--set datasets[3].path: datasets has no entry 3"]
    assert mistakes(GOOD, "base_model.x=1") == ["--set base_model.x: base_model has no keys"]


def test_files_that_are_no_config(mistakes, tmp_path):
    assert mistakes("- a") == ["cfg.yaml: must be a mapping of keys to values; got a list"]
    assert len(mistakes("")) == 3
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def test_the_reference_page_lists_every_key():
    written = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    assert page() == written, "run python -m pyfastlora.trainer.config.reference > docs/config.md"
    for name in [*Config.model_fields, *FOREIGN]:
        assert f"\n| `{name}` |" in written
    for _, schema in sections():
        assert all(f"\n| `{name}` |" in written for name in schema.model_fields), schema


@pytest.mark.parametrize(
    ("entry", "sentences"),
    [
        (
            "type:\n      format: '{instruction!r}'\n      formt: x",
            [
                "cfg.yaml:8:7: datasets[0].type.format: has {instruction!r}; "
                "it can have {instruction}, {input}",
                "cfg.yaml:9:7: datasets[0].type.formt: unknown key; did you mean format?",
            ],
        ),
        (
            "type: 3",
            ["cfg.yaml:7:5: datasets[0].type must be a name, or a mapping that is a template; got 3"],
        ),
        (
            "type: chat_template\n    roles: [a]\n    message_property_mappings: {from: x}",
            [
                "cfg.yaml:8:5: datasets[0].roles must be a mapping of keys to values; got a list",
                'cfg.yaml:9:33: datasets[0].message_property_mappings.from must be role or content; got "from"',  # noqa: E501
            ],
        ),
        (
            "type: alpaca\n    train_on_eos: all",
            [f"cfg.yaml:8:5: train_on_eos goes with type: {', '.join(CHATS)}"],
        ),
        (
            "type: sharegpt\n    chat_template: jinja",
            ["cfg.yaml:8:5: chat_template: jinja and chat_template_jinja, its text, go together"],
        ),
        (
            "type: sharegpt\n  - path: b\n    type: chat_template\n    chat_template: chatml",
            [
                "cfg.yaml:10:5: datasets[1] and datasets[0] have other chat templates; a model is saved with one"  # noqa: E501
            ],
        ),
    ],
)
def test_mistakes_in_a_datasets_type(mistakes, entry, sentences):
    head = "base_model: m\nadapter: lora\nlora_target_linear: true\nlearning_rate: 1e-3\n"
    assert mistakes(f"{head}datasets:\n  - path: a\n    {entry}\n") == sentences


def test_a_template_and_chat_keys_read_back_the_same(load):
    head = "base_model: m\nadapter: lora\nlora_target_linear: true\nlearning_rate: 1e-3\n"
    config = load(
        f"{head}datasets:\n  - path: a\n    type:\n      format: '[{{instruction}}]'\n"
        "  - path: b\n    type: chat_template\n    roles: {user: [u]}\n    train_on_eos: last\n  - path: c\n"
    ).config
    again = load(yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)).config
    assert again == config and again.datasets[2].type is None


def test_a_base_config_is_read_first(load, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/model.yaml").write_text(
        "base_model: m\nadapter: lora\nlora_target_linear: true\nspecial_tokens: {pad_token: p, eos_token: e}\n"  # noqa: E501
    )
    (tmp_path / "shared/run.yaml").write_text("base_config: model.yaml\nlearning_rate: 1e-4\nlora_r: 4\n")
    text = (
        "base_config: shared/run.yaml\nlora_r: 16\nspecial_tokens: {pad_token: x}\n"
        "datasets: [{path: d, type: alpaca}]\n"
    )
    config = load(text).config
    assert (config.base_model, config.learning_rate, config.lora_r) == ("m", 1e-4, 16)
    assert (config.special_tokens.pad_token, config.special_tokens.eos_token) == ("x", "e")
    assert config.base_config is None  # the resolved file stands alone


def test_mistakes_in_a_base_config_have_its_name(mistakes, tmp_path):
    (tmp_path / "base.yaml").write_text("lora_r: -1\nseed: -1\nbase_model: m\n")
    text = "base_config: base.yaml\nlora_r: -2\n" + GOOD.replace("base_model: ./model\n", "")
    assert mistakes(text) == [
        "cfg.yaml:2:1: lora_r must be greater than 0; got -2",
        "base.yaml:2:1: seed must be at least 0; got -1",
    ]
    (tmp_path / "base.yaml").write_text("base_config: cfg.yaml\n")
    assert mistakes(text) == ["base.yaml:1:1: base_config: cfg.yaml is based on this file: a circle"]
    assert mistakes("base_config: no.yaml\n") == ["cfg.yaml:1:1: base_config: no.yaml: no such file"]
    assert mistakes("base_config: [a]\n") == [
        "cfg.yaml:1:1: base_config must be the name of a file; got a list"
    ]
    assert mistakes(GOOD, "base_config=x") == ["--set base_config: is read from the file only"]


def test_the_environment_is_read_where_it_is_asked_for(load, mistakes, monkeypatch):
    monkeypatch.setenv("OUT", "/data/$HOME")
    monkeypatch.setenv("RANK", "32")
    config = load(GOOD + "output_dir: ${env:OUT}/run\nlora_r: ${env:RANK}\n").config
    assert config.output_dir == "/data/$HOME/run" and config.lora_r == 32
    assert load(GOOD + "output_dir: $OUT\n").config.output_dir == "$OUT"
    assert mistakes(GOOD + "seed: ${env:NOT_SET_ANYWHERE}\n") == [
        "cfg.yaml:8:7: ${env:NOT_SET_ANYWHERE}: the environment has no NOT_SET_ANYWHERE"
    ]


def test_keys_in_the_wrong_place_are_told_where_they_belong(mistakes):
    assert mistakes(GOOD + "ds_type: json\nbnb_4bit_quant_type: nf4\n") == [
        "cfg.yaml:8:1: ds_type: unknown key; it is a key of datasets",
        "cfg.yaml:9:1: bnb_4bit_quant_type: unknown key; it is a key of bnb_config_kwargs",
    ]
    text = GOOD.replace("type: alpaca", "type: alpaca\n    sequence_len: 9")
    assert mistakes(text) == [
        "cfg.yaml:5:5: datasets[0].sequence_len: unknown key; it is a key of the top level"
    ]


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ("adapter:\nlora_r: 4", ["lora_r goes with adapter: lora or qlora", "lora_target_linear goes with"]),
        ("adapter: lora\nload_in_8bit: true\nload_in_4bit: true", ["exclude each other; keep one"]),
        (
            "adapter: qlora\nload_in_8bit: true",
            ["load_in_8bit: true goes with adapter: lora; got adapter: qlora"],
        ),
        (
            "adapter: lora\ndataset_shard_num: 2\ndataset_shard_idx: 2",
            ["must be less than dataset_shard_num (2)"],
        ),
        ("adapter: lora\ndataset_shard_idx: 1", ["must be less than dataset_shard_num (1); got 1"]),
        ("adapter: lora\nchat_template: jinja", ["chat_template: jinja and chat_template_jinja"]),
        (
            "adapter: lora\ntrain_sampling_strategy: random\ngroup_by_length: true",
            ["group_by_length asks for group_by_length order, another key for random"],
        ),
    ],
)
def test_keys_that_contradict_each_other(mistakes, change, sentences):
    found = mistakes(GOOD.replace("adapter: lora", change))
    assert len(found) == len(sentences)
    assert all(wanted in got for wanted, got in zip(sentences, found, strict=True))


def test_without_an_adapter_the_model_is_trained(load):
    text = GOOD.replace("adapter: lora\nlora_target_linear: true\n", "")
    assert load(text).config.adapter is None and load(text + "adapter:\n").config.bits is None
