"""The quickstart: what its text is made of, how its base is cached, and the whole tour in small."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyfastlora.cli.quickstart import quickstart
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.quickstart import base_model, corpus, tour

TINY = base_model.Recipe(
    vocab_size=512, hidden_size=64, intermediate_size=128, layers=1, window=32, batch=2, seconds=60, steps=4
)

SOURCE = '''
import os

@decorated(
    "twice")
async def fetch(name, {n}=0):
    """Fetch the {n} of a name,
    and wait for it.

    More that is not wanted.
    """
    """Not a docstring."""
    return await os.fetch(name, {n})

class Thing:
    def one(self): "A one-line function {n} of a class."; return self.value + {n} + self.other + self.more

    def bare(self):
        """A docstring and nothing else here, {n}."""

    def undocumented(self):
        return self.{n}
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A made-up standard library with enough documented functions for every share."""
    folder = tmp_path / "library"
    (folder / "test").mkdir(parents=True)
    for i in range(300):
        n = "x" * (i % 17 + 1) + str(i)
        (folder / f"module_{i}.py").write_text(SOURCE.format(n=n))
    (folder / "test" / "test_it.py").write_text(SOURCE.format(n="in_a_test"))
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b'x = "\xff"\n')
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(base_model._cache, "cache_dirs", lambda: [tmp_path / "cache"])
    return tmp_path / "cache"


def quiet() -> Console:
    return Console(quiet=True)


def test_pairs_are_code_without_docstring_and_first_paragraph(library):
    pairs = corpus.read_corpus(library).train
    one = next(p for p in pairs if p.summary.startswith("Fetch the"))
    n = one.summary.split()[2]
    assert one.summary == f"Fetch the {n} of a name, and wait for it."
    assert one.code == (
        f'async def fetch(name, {n}=0):\n    """Not a docstring."""\n    return await os.fetch(name, {n})'
    )
    assert not any("in_a_test" in p.code or "nothing else" in p.summary for p in pairs)


def test_no_file_is_in_two_shares(library):
    found = corpus.read_corpus(library)
    for pairs, share in ((found.train, "train"), (found.held_out, "held_out")):
        assert pairs and {corpus.share_of(p.file) for p in pairs} == {share}
    for path in library.glob("module_*.py"):
        assert (path.read_text() in found.base_text) == (corpus.share_of(path.name) == "base")


def test_this_python_has_enough_text():
    found = corpus.read_corpus()
    train, held_out = ({p.file for p in pairs} for pairs in (found.train, found.held_out))
    assert not train & held_out and len(found.train) > 500 and len(found.held_out) > 30
    assert not {p.summary for p in found.train} & {p.summary for p in found.held_out}
    assert sum(map(len, found.base_text)) > 3e6
    assert not any(p.summary in p.code for p in found.held_out)


def test_too_little_text_is_told(tmp_path):
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(
        UserError, match="has 0 documented functions to train on and 0 to hold out; quickstart needs"
    ):
        corpus.read_corpus(tmp_path)


def test_a_base_is_trained_once(cache, monkeypatch):
    texts = ["def f(x): return x\n" * 50] * 20
    first = base_model.obtain(TINY, texts, quiet())
    assert json.loads((first / "recipe.json").read_text())["steps_done"] == 4
    monkeypatch.setattr(base_model, "_train", lambda *_: pytest.fail("trained again"))
    assert base_model.obtain(TINY, texts, quiet()) == first
    assert [p.name for p in cache.iterdir()] == [first.name]


def test_a_base_of_all_steps_is_the_same_every_time(cache, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    weights = []
    for name in ("one", "two"):
        monkeypatch.setattr(base_model._cache, "cache_dirs", lambda name=name: [tmp_path / name])
        folder = base_model.obtain(TINY, ["def f(x): return x\n" * 50] * 20, quiet())
        weights.append(load_file(folder / "model.safetensors"))
    assert all(weights[0][k].equal(weights[1][k]) for k in weights[0])


def test_seconds_end_the_training(cache):
    recipe = base_model.Recipe(**{**vars(TINY), "seconds": 1e-6, "steps": 10**6})
    folder = base_model.obtain(recipe, ["def f(x): return x\n" * 50] * 20, quiet())
    assert json.loads((folder / "recipe.json").read_text())["steps_done"] == 1


def test_an_interrupted_base_leaves_nothing(cache, monkeypatch):
    def interrupted(recipe, texts, folder, console):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_model.obtain(TINY, ["text"], quiet())
    assert list(cache.iterdir()) == []


def test_what_a_killed_run_left_is_swept_a_day_later(cache):
    for name, age in ((".build-old", 90_000), (".build-new", 60)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    base = base_model.obtain(TINY, ["def f(x): return x\n" * 50] * 20, quiet())
    assert {p.name for p in cache.iterdir()} == {base.name, ".build-new"}


def test_of_two_bases_that_finish_at_once_the_first_stays(cache, monkeypatch):
    entry = cache / TINY.cache_name()

    def overtaken(recipe, texts, folder, console):
        (folder / "recipe.json").write_text("second")
        entry.mkdir()
        (entry / "recipe.json").write_text("first")

    monkeypatch.setattr(base_model, "_train", overtaken)
    assert base_model.obtain(TINY, ["text"], quiet()) == entry
    assert (entry / "recipe.json").read_text() == "first" and [p.name for p in cache.iterdir()] == [
        entry.name
    ]


def test_no_place_for_a_base_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(base_model._cache, "cache_dirs", lambda: [tmp_path / "file" / "cache"])
    with pytest.raises(
        UserError, match="no folder for the base model can be written .*Not a directory.*FASTLORA_CACHE"
    ):
        base_model.obtain(TINY, ["text"], quiet())


@pytest.mark.parametrize("adapter", ["lora", "qlora", "dora"])
def test_the_whole_tour(cache, library, tmp_path, monkeypatch, adapter):
    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    options = tour.Options(adapter, None, TINY, library, epochs=0.3, compare_steps=4, samples=2)
    summary = tour.run(options, quiet())

    folder = tmp_path / "quickstart" / adapter
    assert {p.name for p in folder.iterdir()} == {
        *("quickstart.yaml", "train.jsonl", "held_out.jsonl", "run", "curves.png", "summary.json"),
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((folder / "summary.json").read_text())["held_out_loss_after"]
        == summary["held_out_loss_after"]
    )
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert len(summary["samples"]) == 2
    assert (
        len(summary["comparison"]["fast_losses"]) == 4 and summary["comparison"]["largest_difference"] < 0.02
    )
    assert all(row["fused"] for row in summary["kernels"]["rows"])
    settings = json.loads((folder / "run" / "adapter_config.json").read_text())
    assert settings["use_dora"] == (adapter == "dora")

    assert tour._folder(options) == Path(
        "quickstart", f"{adapter}-2"
    )  # nothing is overwritten by a second run


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    result = CliRunner().invoke(quickstart, ["--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"Error: --dir: {tmp_path} is not empty (it holds notes.txt); choose another --dir"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
