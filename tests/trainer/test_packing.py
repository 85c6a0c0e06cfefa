"""Packed rows: every sample once, no token that sees another document, the loss of the samples unpacked."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from pyfastlora.cli.train import train
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.packing import LEAKS, PackedCollator, leak, pack

VOCABULARY = 96


def samples(count: int = 23, longest: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    """Documents whose first third is a prompt."""
    random = np.random.default_rng(seed)
    made = []
    for n in random.integers(2, longest + 1, count):
        ids = random.integers(0, VOCABULARY, n).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * (n // 3) + ids[n // 3 :]})
    return made


def rows_of(data: list[dict[str, Any]], capacity: int, **options: Any) -> list[list[dict[str, Any]]]:
    packing = pack([len(sample["input_ids"]) for sample in data], capacity, **options)
    return [[data[i] for i in packing.row(row)] for row in range(len(packing))]


@pytest.mark.parametrize("most", [0, 2])
def test_every_sample_is_in_one_row_that_holds_it(most):
    data = samples(200)
    lengths = np.array([len(sample["input_ids"]) for sample in data])
    packing = pack(lengths, 32, most=most)
    assert sorted(packing.samples.tolist()) == list(range(200))
    for row in range(len(packing)):
        assert 0 < lengths[packing.row(row)].sum() <= 32
        assert not most or len(packing.row(row)) <= most
    assert packing.bound <= len(packing) and packing.tokens == lengths.sum()
    assert f"200 samples in {len(packing)} rows of 32 tokens, {packing.efficiency:.1%} full" in str(packing)


def test_a_seed_decides_who_meets_whom():
    lengths = [len(sample["input_ids"]) for sample in samples(200)]
    first, again, other = (pack(lengths, 32, seed=seed) for seed in (1, 1, 2))
    assert first.samples.tolist() == again.samples.tolist() != other.samples.tolist()
    assert len(first) == len(other)  # and nobody packs worse


def test_nothing_to_pack():
    assert len(pack([], 8)) == 0 and "0 samples in 0 rows" in str(pack([], 8))


def test_batches_by_hand():
    rows = [
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORED, 9]}],
        [{"input_ids": [1, 2], "labels": [1, 2]}],
    ]
    batch = PackedCollator(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    x = IGNORED
    assert batch["labels"].tolist() == [[x, 6, 7, x, 9], [x, 2, x, x, x]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["tokens"] == 7 and batch["use_cache"] is False
    wide = PackedCollator(pad_id=0, pad_to=6)(rows)
    assert wide["input_ids"].shape == (2, 6) and wide["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0]
    flat = PackedCollator(pad_id=0, flat=True)(rows)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 0, 0, 0]]
    assert flat["cu_seq_lens_q"].tolist() == flat["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 10]
    assert flat["max_length_q"] == flat["max_length_k"] == 3 and flat["cu_seq_lens_q"].dtype == torch.int32


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
FALCON = {"new_decoder_architecture": False, "multi_query": True, "alibi": False}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 128}


def model_of(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    own = MPT if family == "mpt" else SIZES | (FALCON if family == "falcon" else {})
    config = AutoConfig.for_model(family, **own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not the same everywhere
            parameter.mul_(3)
    return model.eval()


def loss_per_token(model: Any, batches: list[dict[str, Any]]) -> float:
    """Each batch's mean, weighted with what is trained on in it."""
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            tokens = batch.pop("tokens")
            trained = int((batch["labels"][:, 1:] != IGNORED).sum())
            assert tokens >= trained
            total += float(model(**batch).loss) * trained
            count += trained
    return total / count


FAMILIES = [(family, how) for family in ("llama", "qwen3", "phi3", "gpt_neox") for how in ("sdpa", "eager")]


@pytest.mark.parametrize(("family", "attention"), [*FAMILIES, ("gemma2", "eager")])
def test_the_loss_is_that_of_the_samples_unpacked(family, attention):
    model, data = model_of(family, attention), samples()
    rows = rows_of(data, 40)
    packed = [PackedCollator(0)(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    plain = [PaddingCollator(0)(data[i : i + 4]) for i in range(0, len(data), 4)]
    assert loss_per_token(model, packed) == pytest.approx(loss_per_token(model, plain), rel=2e-5)
    assert leak(model, PackedCollator(0), VOCABULARY, torch.device("cpu")) <= LEAKS


@pytest.mark.parametrize("family", ["falcon", "mpt"])
def test_a_model_that_leaks_is_found(family):
    model = model_of(family, "eager").train()
    assert leak(model, PackedCollator(0), VOCABULARY, torch.device("cpu")) > 10 * LEAKS
    assert model.training


@pytest.mark.parametrize("flat", [False, True])
def test_the_probe_gives_a_model_what_training_gives_it(flat):
    """Flash attention tells documents apart in one flat row, by where they begin."""
    asked = []

    def model(**batch: Any) -> Any:
        asked.append(batch)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(batch["input_ids"], VOCABULARY).float())

    model.training, model.eval, model.train = False, lambda: None, lambda mode: None
    assert leak(model, PackedCollator(0, 64, flat), VOCABULARY, torch.device("cpu")) == 0
    for batch in asked:
        assert batch["input_ids"].shape == (1, 64) and batch["use_cache"] is False and "tokens" not in batch
        assert batch["position_ids"][0, [8, 9, 20, 21]].tolist() == [8, 0, 11, 0]
        assert not flat or batch["cu_seq_lens_q"].tolist() == [0, 9, 21, 64]
    assert len(asked) == 2 and not torch.equal(asked[0]["input_ids"], asked[1]["input_ids"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_as_many_steps_and_no_row_is_lost(ranks):
    """The packing is the same on every rank; accelerate deals batches out and repeats some."""
    data = samples(101)
    rows = rows_of(data, 40, seed=7)
    dealt = []
    for rank in range(ranks):
        own = rows_of(data, 40, seed=7)
        loader = torch.utils.data.DataLoader(own, batch_size=2, collate_fn=PackedCollator(0))
        mine = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
        dealt.append([tuple(row.tolist()) for batch in mine for row in batch["input_ids"]])
    assert len({len(own) for own in dealt}) == 1
    found = {tuple(token for token in row if token) for own in dealt for row in own}
    joined = [itertools.chain(*(sample["input_ids"] for sample in row)) for row in rows]
    assert found == {tuple(token for token in row if token) for row in joined}


def run(config: Path, *overrides: str) -> Any:
    arguments = [part for override in ("sequence_len=256", *overrides) for part in ("--set", override)]
    return CliRunner().invoke(train, [str(config), *arguments])


def log(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    held_out = write_jsonl(alpaca_rows[:5], "held_out.jsonl")
    extra = f"test_datasets:\n  - path: {held_out}\n    type: alpaca\neval_on_start: true\n"
    return config_file(write_jsonl(alpaca_rows), extra)


def test_trains_packed(config, tmp_path):
    done = run(config, "sample_packing=true", "max_steps=", "num_epochs=4", "micro_batch_size=1")
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    packing = json.loads((out / "data.json").read_text())["packing"]
    assert "packed: " in done.stdout and packing["rows"] < packing["samples"] and packing["efficiency"] > 0.8
    first, *_, last = log(out, "train")
    assert last["loss"] < first["loss"] and last["step"] == 4 * packing["rows"]
    before, *_ = log(out, "eval")
    own = f"output_dir={tmp_path}/plain"
    plain = run(config, own, "sample_packing=true", "eval_sample_packing=false", "max_steps=1")
    assert plain.exit_code == 0, plain.stderr
    unpacked, *_ = log(tmp_path / "plain", "eval")
    assert before["eval_loss"] == pytest.approx(unpacked["eval_loss"], rel=1e-5)
    assert before["eval_tokens"] == unpacked["eval_tokens"]


def test_packed_in_workers_with_an_embedding_and_accumulation(config, tmp_path):
    options = ("lora_target_modules=[q_proj, embed_tokens]", "lora_target_linear=false", "max_steps=2")
    done = run(config, "sample_packing=true", "dataloader_num_workers=1", "micro_batch_size=2", *options)
    assert done.exit_code == 0, done.stderr
    one = run(
        config,
        *("sample_packing=true", "gradient_accumulation_steps=2", "micro_batch_size=1", *options),
        f"output_dir={tmp_path}/two",
    )
    assert one.exit_code == 0, one.stderr
    for big, small in zip(log(tmp_path / "out", "train"), log(tmp_path / "two", "train"), strict=True):
        assert big["loss"] == pytest.approx(small["loss"], rel=1e-4)
        assert big["tokens"] == small["tokens"] and big["trained_tokens"] == small["trained_tokens"]


@pytest.mark.parametrize("asked", ["true", "auto"])
def test_a_model_that_leaks_is_not_trained_packed(config, tmp_path, monkeypatch, asked):
    monkeypatch.setattr("pyfastlora.trainer.packing.leak", lambda *_: 0.25)
    done = run(config, f"sample_packing={asked}", "max_steps=1")
    sentence = "a document changes with the one before it in its row (by 0.25 of the logits' spread)"
    if asked == "true":
        assert done.exit_code == 1 and f"sample_packing: {sentence}" in done.stderr
        assert not (tmp_path / "out").exists()
    else:
        assert done.exit_code == 0 and f"not packed: {sentence}" in done.stdout
