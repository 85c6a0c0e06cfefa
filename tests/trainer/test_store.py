"""Prepared data on disk: made once, found again by content, and never by anything else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.data import store
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.errors import DataError
from pyfastlora.trainer.model import load_tokenizer


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Grows by one for every dataset that is tokenised."""
    calls: list[int] = []
    real = store.tokenise

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(store, "tokenise", counted)
    return calls


def prepared(config: Path, *overrides: str):
    loaded = load_config(config, overrides).config
    return prepare(loaded, load_tokenizer(loaded))


def test_the_same_content_is_prepared_once(made, config_file, write_jsonl, alpaca_rows, tmp_path):
    config = config_file(write_jsonl(alpaca_rows))
    first = prepared(config)
    assert prepared(config).train[:] == first.train[:] and prepared(config).report == first.report
    copy = write_jsonl(alpaca_rows, "copy.jsonl")
    os.utime(copy, (1, 1))
    again = prepared(config, f"datasets[0].path={copy}", "lora_r=2", "datasets[0].weight=2")
    assert len(again.train) == 2 * len(first.train) and made == [1]
    assert {f.name[:5] for f in (tmp_path / "prepared_data").iterdir()} == {"data-"}


def test_a_byte_edited_in_place_is_seen(made, config_file, write_jsonl, alpaca_rows):
    data = write_jsonl(alpaca_rows)
    config, before = config_file(data), data.stat()
    first = prepared(config)
    text = data.read_bytes().replace(b"hello ", b"jello ", 1)
    with data.open("r+b") as file:
        file.write(text)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = data.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert prepared(config).train[:] != first.train[:] and made == [1, 1]


@pytest.mark.parametrize(
    "override",
    [
        "sequence_len=64",
        "train_on_inputs=true",
        "excess_length_strategy=truncate",
        "on_bad_row=skip",
        "tokens=[hello]",
        "special_tokens.pad_token=<pad>",
        "datasets[0].type=alpaca_chat",
        "datasets[0].shards=2",
    ],
)
def test_what_shapes_a_sample_is_part_of_the_name(made, config_file, write_jsonl, alpaca_rows, override):
    config = config_file(write_jsonl(alpaca_rows), "lora_modules_to_save: [embed_tokens, lm_head]\n")
    prepared(config)
    prepared(config, override)
    assert made == [1, 1]


def test_a_chat_template_is_part_of_the_name(made, config_file, write_jsonl):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    config = config_file(write_jsonl(rows))
    chat = ("datasets[0].type=chat_template", "chat_template=chatml")
    ids = prepared(config, *chat).train["input_ids"][0]
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    jinja += "assistant: {% endif %}"
    own = (
        "datasets[0].type=chat_template",
        "chat_template=jinja",
        f"chat_template_jinja={json.dumps(jinja)}",
    )
    assert prepared(config, *own).train["input_ids"][0] != ids and made == [1, 1]


def test_a_folder_that_is_not_whole_is_made_again(made, config_file, write_jsonl, alpaca_rows, tmp_path):
    config = config_file(write_jsonl(alpaca_rows))
    first = prepared(config).train[:]
    (folder,) = (f for f in (tmp_path / "prepared_data").iterdir() if f.is_dir())
    (folder / store.COUNTS).unlink()
    (folder / store.SAMPLES).write_bytes(b"half")
    assert prepared(config).train[:] == first and made == [1, 1]


def test_dataset_prepared_path_is_the_place(config_file, write_jsonl, alpaca_rows, tmp_path):
    config = config_file(write_jsonl(alpaca_rows))
    prepared(config, f"dataset_prepared_path={tmp_path / 'mine'}")
    assert len(list((tmp_path / "mine").glob("data-*/samples.arrow"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="prepared data cannot be written to .*/file"):
        prepared(config, f"dataset_prepared_path={tmp_path / 'file'}")


def test_a_file_that_changes_while_it_is_read(config_file, write_jsonl, alpaca_rows, tmp_path):
    data = write_jsonl(alpaca_rows)
    loaded = load_config(config_file(data)).config

    def change(rows: int) -> None:
        write_jsonl([*alpaca_rows, alpaca_rows[0]])

    with pytest.raises(DataError, match="changed while it was read; start again"):
        prepare(loaded, load_tokenizer(loaded), change)
    assert not list((tmp_path / "prepared_data").glob("data-*"))


PREPARE = """
import os, sys
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.data import store
from pyfastlora.trainer.model import load_tokenizer
real = store.tokenise
def said(*args):
    print("made", flush=True)
    return real(*args)
store.tokenise = said
def progress(rows):
    if len(sys.argv) > 2:
        os.kill(os.getpid(), 9)
config = load_config(sys.argv[1]).config
print(prepare(config, load_tokenizer(config), progress).report["train_samples"])
"""


def test_many_processes_make_it_once(config_file, write_jsonl, alpaca_rows, tmp_path):
    config = config_file(write_jsonl(alpaca_rows * 200), f"dataset_prepared_path: {tmp_path / 'mine'}\n")
    command = [sys.executable, "-c", PREPARE, str(config)]
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [line for process in many for line in process.communicate(timeout=300)[0].split()]
    assert sorted(said) == ["4800", "4800", "4800", "made"]
    assert len(list((tmp_path / "mine").glob("data-*/counts.json"))) == 1


def test_what_was_killed_is_never_read(config_file, write_jsonl, alpaca_rows, tmp_path):
    config = config_file(write_jsonl(alpaca_rows * 100), f"dataset_prepared_path: {tmp_path / 'mine'}\n")
    killed = subprocess.run(
        [sys.executable, "-c", PREPARE, str(config), "die"], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL and killed.stdout == "made\n"
    assert not list((tmp_path / "mine").glob("data-*/counts.json"))
    assert len(prepared(config).train) == 2400
