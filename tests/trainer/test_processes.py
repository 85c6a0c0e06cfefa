"""Who this process is, and which strategy is in effect: what the environment and the configuration say."""

from __future__ import annotations

import json

import pytest

from pyfastlora.trainer.errors import ConfigError, UserError
from pyfastlora.trainer.launch import wanted_processes
from pyfastlora.trainer.processes import Processes, first_host, join
from pyfastlora.trainer.strategy import resolve

TWO = Processes(0, 0, 2)
BASE = (
    "base_model: m\nlearning_rate: 1e-4\nadapter: lora\nlora_target_linear: true\n"
    "datasets: [{path: d, type: alpaca}]\n"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "SLURM_NTASKS",
        "SLURM_STEP_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)


def test_alone_and_started_by_torchrun(monkeypatch):
    assert join() == Processes(0, 0, 1) and join().is_first
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert join() == Processes(5, 1, 8) and not join().is_first
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="RANK, LOCAL_RANK of a group of processes is set, WORLD_SIZE is not"):
        join()


def test_a_shell_of_srun_starts_its_own(monkeypatch, load):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert wanted_processes(load(BASE).config, 4, 1) == 4
    assert wanted_processes(load(BASE).config, 1, 1) == 0
    assert wanted_processes(load(BASE).config, 1, 1, max_restarts=2) == 1


def test_started_by_srun(monkeypatch):
    import os

    slurm = {"STEP_ID": "0", "NTASKS": "16", "PROCID": "9", "LOCALID": "1", "STEP_NODELIST": "gpu[07-08]"}
    for name, value in (slurm | {"JOB_ID": "123456"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # monkeypatch takes away again what join sets
    assert join() == Processes(9, 1, 16)
    assert os.environ["MASTER_ADDR"] == "gpu07" and os.environ["MASTER_PORT"] == "23456"


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ],
)
def test_started_by_mpirun(monkeypatch, load, names):
    for name, value in zip(names, ("3", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # monkeypatch takes away again what join sets
    assert wanted_processes(load(BASE + "strategy: fsdp2").config, None, 1) == 0  # none of its own
    with pytest.raises(ConfigError, match="this one was started as one of several"):
        wanted_processes(load(BASE).config, 4, 1)
    assert join() == Processes(3, 1, 4)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login1", "gpu07"), ("a-1,a-2", "a-1"), ("node5", "node5"), ("n[1,3]", "n1")],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "name", "stage"),
    [
        ("", "ddp", None),
        ("strategy: zero2", "zero2", 2),
        ("deepspeed: zero3_offload", "zero3_offload", 3),
        ("deepspeed: {zero_optimization: {stage: 1}, train_batch_size: auto}", "zero1", 1),
        ("strategy: fsdp2\nfsdp_config: {fsdp_offload_params: true, fsdp_sharding_strategy: SHARD_GRAD_OP}",
         "fsdp2_offload", None),
        ("fsdp: [full_shard, auto_wrap]", "fsdp2", None),
        ("fsdp: [no_shard]", "ddp", None),
    ],
)  # fmt: skip
def test_what_is_in_effect(load, text, name, stage):
    config = load(BASE + text).config
    found = resolve(config, TWO, "cpu")
    assert found.name == name and str(found) == f"{name}, 2 processes"
    assert (found.deepspeed or {"zero_optimization": {"stage": None}})["zero_optimization"]["stage"] == stage
    assert found.divides_weights == (name.startswith("fsdp2") or stage == 3)
    if stage:
        assert found.deepspeed["train_micro_batch_size_per_gpu"] == config.micro_batch_size
        assert "train_batch_size" not in found.deepspeed


def test_one_process_needs_none(load):
    assert resolve(load(BASE).config, Processes(), "cpu").name == "single"
    assert str(resolve(load(BASE + "strategy: ddp").config, Processes(), "cpu")) == "single"


def test_a_file_of_deepspeeds(load, tmp_path):
    config = load(BASE + "deepspeed: ds.json\nmicro_batch_size: 4").config
    with pytest.raises(ConfigError, match="ds.json: no such file; give one, or a preset as strategy .zero1"):
        resolve(config, TWO, "cpu")
    file = tmp_path / "ds.json"
    for text, why in (
        ("{", "is not JSON"),
        ("[]", "holds no mapping"),
        (json.dumps({"optimizer": {}, "scheduler": {}}), "optimizer and scheduler come from the YAML"),
        (json.dumps({"train_micro_batch_size_per_gpu": 2}), "is 2, the YAML has 4; write auto there"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            resolve(config, TWO, "cpu")
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}}))
    assert resolve(config, TWO, "cpu").deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": True}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("strategy: zero2\ndeepspeed: zero1", "strategy and deepspeed both say"),
        (
            "fsdp_config: {offload_params: true}",
            "fsdp_config goes with strategy: fsdp2; got strategy: nothing",
        ),
        ("strategy: fsdp2\nload_in_8bit: true", "fsdp2 divides weights, 8-bit ones cannot be"),
        ("strategy: zero3\noptimizer: adamw_bnb_8bit", "does not know divided weights"),
        ("strategy: fsdp3", "strategy"),
        (
            "strategy: fsdp2\nfsdp_config: {sharding_strategy: HYBRID_SHARD}",
            "must be FULL_SHARD or SHARD_GRAD_OP",
        ),
    ],
)
def test_what_does_not_go_together(mistakes, text, why):
    assert any(why in line for line in mistakes(BASE + text))


def test_four_bit_weights_are_divided_as_the_compute_dtype(load, mistakes):
    text = BASE.replace("adapter: lora", "adapter: qlora") + "strategy: fsdp2\n"
    assert "got uint8 and none" in mistakes(text)[0]
    load(text + "bnb_config_kwargs: {bnb_4bit_quant_storage: bfloat16, bnb_4bit_compute_dtype: bfloat16}")
    load(text.replace("fsdp2", "zero3"))
