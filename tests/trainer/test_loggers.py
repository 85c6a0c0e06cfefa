"""Loggers of other people: silent unless asked, and then told what log.jsonl is told."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyfastlora.cli.train import train
from pyfastlora.trainer import loggers
from pyfastlora.trainer.run_dir import RunDir

from .test_config import GOOD


@pytest.fixture
def config(write_jsonl, alpaca_rows, config_file) -> Path:
    extra = "val_set_size: 4\neval_strategy: steps\neval_steps: 2\nfastlora: false\n"
    return config_file(write_jsonl(alpaca_rows), extra)


def run(config: Path, *overrides: str) -> RunDir:
    given = [part for override in ("max_steps=2", *overrides) for part in ("--set", override)]
    result = CliRunner().invoke(train, [str(config), *given], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return RunDir(config.parent / "out")


class Recorded(types.ModuleType):
    """A package that remembers its calls, whatever they are."""

    def __init__(self, name: str, **parts: Any) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "9.0"
        self.calls: list[tuple[str, tuple, dict]] = []
        self.seen: dict[str, str] = {}
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            self.seen |= os.environ
            return None

        return call

    def of(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


class Settings(dict):
    """The configuration that such a package keeps of a run."""

    def update(self, new: dict, allow_val_change: bool = False) -> None:
        super().update(new)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fake(name, **parts): a package of that name that is there."""

    def make(name: str, **parts: Any) -> Recorded:
        module = Recorded(name, **parts)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def scalars(records: list[dict], prefix: str, drop: str = "") -> dict[tuple[str, int], float]:
    """What a logger has to be told of lines of the log."""
    return {
        (prefix + key.removeprefix(drop), line["step"]): value
        for line in records
        for key, value in line.items()
        if key not in ("event", "time", "step")
    }


def told(records: list[dict], evaluations: list[dict]) -> dict[tuple[str, int], float]:
    found = scalars(records, "train/") | scalars(evaluations, "eval/", "eval_")
    moved = {(k.replace("eval/epoch", "train/epoch"), step): v for (k, step), v in found.items()}
    assert ("train/trained_tokens_per_second", 2) in moved and ("eval/loss", 2) in moved
    return moved


def test_tensorboard_has_the_numbers_of_the_log(config):
    run_dir = run(config, "use_tensorboard=true")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.path / "tensorboard"))
    events.Reload()
    found = {
        (tag, scalar.step): scalar.value for tag in events.Tags()["scalars"] for scalar in events.Scalars(tag)
    }
    wanted = told(run_dir.read_log("train"), run_dir.read_log("eval"))
    assert {key: found.get(key) for key in wanted} == {
        key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()
    }


def test_wandb_is_told_offline(config, fake, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run_of = types.SimpleNamespace(summary={}, _label=lambda **kwargs: None)
    wandb = fake("wandb", run=None, config=Settings())

    def init(**kwargs: Any) -> None:
        wandb.calls.append(("init", (), kwargs))
        wandb.seen |= os.environ
        wandb.run = run_of

    wandb.init = init
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        fake(name)
    fake("wandb.sdk.lib.config_util", ConfigError=KeyError)
    run_dir = run(config, "wandb_project=mine", "wandb_entity=us", "wandb_name=first", "wandb_mode=offline")
    assert wandb.of("init") == [((), {"project": "mine", "name": "first"})]
    assert wandb.seen["WANDB_MODE"] == "offline" and wandb.seen["WANDB_ENTITY"] == "us"
    assert wandb.seen["WANDB_DIR"] == str(tmp_path / "out")
    assert wandb.config["learning_rate"] == 1e-2 and not wandb.of("watch")
    lines = [args[0] for args, _ in wandb.of("log")]
    found = {(k, line["train/global_step"]): v for line in lines for k, v in line.items()}
    wanted = told(run_dir.read_log("train"), run_dir.read_log("eval"))
    assert {key: found.get(key) for key in wanted} == wanted
    assert "WANDB_MODE" not in os.environ and "WANDB_DIR" not in os.environ


def test_mlflow_is_told_into_a_folder(config, fake, tmp_path):
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow = fake("mlflow", utils=types.SimpleNamespace(validation=limits))
    mlflow.start_run = lambda **kwargs: (
        mlflow.calls.append(("start_run", (), kwargs)),
        setattr(mlflow, "active_run", lambda: types.SimpleNamespace(info=types.SimpleNamespace(run_id="1"))),
    )
    uri = f"file:{tmp_path}/runs"
    run_dir = run(
        config, f"mlflow_tracking_uri={uri}", "mlflow_experiment_name=trials", "mlflow_run_name=first"
    )
    assert mlflow.of("set_tracking_uri") == [((uri,), {})]
    assert mlflow.of("set_experiment") == [(("trials",), {})]
    assert mlflow.of("start_run")[0][1]["run_name"] == "first" and mlflow.of("end_run")
    assert mlflow.seen["MLFLOW_DISABLE_TELEMETRY"] == "true"
    found = {(key, kw["step"]): v for _, kw in mlflow.of("log_metrics") for key, v in kw["metrics"].items()}
    wanted = scalars([*run_dir.read_log("train"), *run_dir.read_log("eval")], "")
    assert ("trained_tokens_per_second", 1) in wanted and ("eval_loss", 2) in wanted
    assert {key: found.get(key) for key in wanted} == wanted


def test_trackio_stays_on_the_machine(config, fake):
    nothing = types.SimpleNamespace(get=lambda: None)
    context = types.SimpleNamespace(current_space_id=nothing)
    trackio = fake("trackio", context_vars=context, config=Settings())
    run_dir = run(config, "trackio_project_name=mine", "trackio_run_name=first")
    (_, given), *more = trackio.of("init")
    assert not more and given["project"] == "mine" and given["name"] == "first"
    assert given["space_id"] is None and given["bucket_id"] is None
    assert not {name for name, *_ in trackio.calls} & {"freeze", "sync", "deploy"}
    lines = [args[0] for args, _ in trackio.of("log")]
    found = {(k, line["train/global_step"]): v for line in lines for k, v in line.items()}
    wanted = told(run_dir.read_log("train"), run_dir.read_log("eval"))
    assert {key: found.get(key) for key in wanted} == wanted


def test_nobody_is_told_unless_asked(load, monkeypatch):
    for variable, value in (("WANDB_PROJECT", "p"), ("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost:1")):
        monkeypatch.setenv(variable, value)
    from transformers import TrainingArguments

    for text in ("", "wandb_project: p\nuse_wandb: false\n", "wandb_project: p\nwandb_mode: disabled\n"):
        found = load(GOOD + text).config
        assert not found.loggers
        with loggers.told(found):
            assert TrainingArguments("out", use_cpu=True, **loggers.arguments(found)).report_to == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_package_that_is_not_there(config, tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    result = CliRunner().invoke(train, [str(config), "--set", f"use_{name}=true"])
    assert result.exit_code == 1
    assert result.stderr.strip() == f"Error: use_{name}: {name} is not installed: pip install {name}"
    assert not (tmp_path / "out").exists()


def test_what_was_in_the_environment_is_put_back(load, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "before")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    found = load(GOOD + "wandb_project: mine\nwandb_run_id: abc\n").config
    with loggers.told(found):
        assert os.environ["WANDB_PROJECT"] == "mine" and os.environ["WANDB_RUN_ID"] == "abc"
        assert os.environ["WANDB_RESUME"] == "allow" and os.environ["WANDB_DIR"] == "/elsewhere"
    assert os.environ["WANDB_PROJECT"] == "before" and "WANDB_RUN_ID" not in os.environ


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "wandb_name: n\n",
            "cfg.yaml:8:1: wandb_name: wandb is told nothing unless use_wandb: true or wandb_project "
            "asks for it",
        ),
        (
            "hf_mlflow_log_artifacts: true\n",
            "cfg.yaml:8:1: hf_mlflow_log_artifacts: mlflow is told nothing unless use_mlflow: true or "
            "mlflow_experiment_name asks for it",
        ),
        (
            "use_wandb: true\nuse_mlflow: true\nwandb_name: a\nmlflow_run_name: b\n",
            "cfg.yaml:10:1: wandb_name and mlflow_run_name differ; a run has one name",
        ),
    ],
)
def test_mistakes(mistakes, text, sentence):
    assert mistakes(GOOD + text) == [sentence]


@pytest.mark.parametrize("off", ["", "false", '""'])
def test_what_asks_for_nothing(load, off):
    keys = ("wandb_project", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_mode", "use_wandb")
    some = keys if off == "" else ("wandb_watch", "wandb_log_model", "wandb_mode")
    assert not load(GOOD + "".join(f"{key}: {off}\n" for key in some)).config.loggers


def test_a_package_that_does_not_load_is_told_before_anything_is(config, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "trackio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it wants another protobuf')\n")
    monkeypatch.syspath_prepend(package.parent)
    result = CliRunner().invoke(train, [str(config), "--set", "use_trackio=true"])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    sentence = "use_trackio: trackio is installed and does not load: it wants another protobuf; pip install"
    assert sentence in result.stderr
