"""Ten thousand files that are nearly right: each is read, or refused in sentences and with its exit code.

No traceback, nothing written, and an exit code that is documented (docs/training.md).
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from pyfastlora.cli.train import train
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.errors import DataError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
CONFIGS, DATA_FILES, RUNS = 5000, 5000, 30

VALUES = [
    *(
        "",
        "true",
        "no",
        "-1",
        "0",
        "1.5",
        "1e400",
        ".nan",
        "99999999999999999999999",
        "2024-01-01",
        "~",
        "''",
    ),
    *(
        "[",
        "]",
        "{",
        "[a, [b]]",
        "{a: b}",
        "a: b: c",
        "- x",
        "&a x",
        "*a",
        "!!python/name:os.system x",
        "!x y",
    ),
    *(
        "'",
        '"',
        "|",
        ">",
        "%",
        "@",
        "`",
        "#",
        "\t",
        "\x00",
        "é",
        "\U0001f600",
        "\u2028",
        "${env:NO_SUCH}",
        "${",
    ),
    *(
        "x" * 3000,
        "[" * 200,
        "datasets",
        "lora_r",
        "alpaca",
        "./nowhere",
        "null: null",
        "? a",
        "---",
        "...",
        "<<: 1",
    ),
]


def mutated_yaml(text: str, chosen: random.Random) -> str:
    """One to three changes to its lines."""
    lines = text.splitlines()
    for _ in range(chosen.randint(1, 3)):
        i, j = (chosen.randrange(len(lines)) for _ in range(2))
        key, colon, _ = lines[i].partition(":")
        at = chosen.randrange(len(lines[i]) + 1)
        lines[i : i + 1] = chosen.choice(
            [
                [],
                [lines[i], lines[j]],
                [f"{key}{colon} {chosen.choice(VALUES)}"],
                [chosen.choice(VALUES) + lines[i]],
                ["  " + lines[i]],
                [lines[i].lstrip()],
                [lines[i][:at] + chosen.choice(VALUES)[:20] + lines[i][at:]],
                [lines[i][:at] + lines[i][at + 1 :]],
                [lines[i][:at], lines[i][at:]],
                [lines[i] + lines[j]],
            ]
        ) or [""]
    return "\n".join(lines) + "\n"


def mutated_bytes(content: bytes, chosen: random.Random) -> bytes:
    """One to three stretches of bytes changed, added, lost or doubled, or the end cut off."""
    found = bytearray(content)
    for _ in range(chosen.randint(1, 3)):
        at, length = chosen.randrange(len(found) + 1), chosen.choice([1, 1, 1, 2, 8, 40])
        other = bytes(
            chosen.choice([*b'\0\n\r",\\{}[]\x80\xff', chosen.randrange(256)]) for _ in range(length)
        )
        replaced = found[at : at + chosen.choice([0, length, length, length])]
        found[at : at + len(replaced)] = chosen.choice([other, b"", replaced * 2])
        if chosen.random() < 0.05:
            del found[at:]
        if not found:
            break
    return bytes(found)


def check_told(output: str) -> None:
    """Sentences for a user, none of them long."""
    assert output.strip() and "Traceback" not in output and "pydantic" not in output, output
    assert all(len(line) < 700 for line in output.splitlines()), output


def test_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MODELS", "SCRATCH"):
        monkeypatch.setenv(name, "./nowhere")
    texts = [path.read_text().replace("lora.yaml", str(path.parent / "lora.yaml")) for path in EXAMPLES]
    chosen, codes = random.Random(0), {0: 0, 1: 0, 2: 0}
    for _ in range(CONFIGS):
        text = mutated_yaml(chosen.choice(texts), chosen)
        Path("cfg.yaml").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(train, ["cfg.yaml", "--set", "base_model=./nowhere"])
        assert isinstance(done.exception, SystemExit), (text, done.exception)
        check_told(done.stderr)
        codes[done.exit_code] += 1
        assert [path.name for path in tmp_path.iterdir()] == ["cfg.yaml"], text
    assert codes[2] > CONFIGS / 2 and codes[1] > CONFIGS / 20 and not codes[0]  # 1: valid, and no model there


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def files(folder: Path) -> Iterator[tuple[str, Any, bytes]]:
    """The name, type and content of a good file of every format, and of most kinds of data."""
    import pyarrow as pa
    import pyarrow.parquet

    alpaca = [{"instruction": f"say {n}", "input": "", "output": "naïve " * n} for n in range(1, 6)]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    yield "a.jsonl", "alpaca", json_lines(alpaca)
    yield "a.json", "alpaca", json.dumps(alpaca, indent=1).encode()
    yield "a.jsonl.gz", "alpaca", gzip.compress(json_lines(alpaca), mtime=0)
    yield "a.csv", "alpaca", b'instruction,input,output\n"say, 1",,one\nsay 2,"x\ny",two\n'
    yield "a.txt", "completion", "one line\nnaïve\n\n".encode()
    yield "c.jsonl", "chat_template", json_lines([{"messages": said}] * 5)
    yield "i.jsonl", None, json_lines([{"input_ids": [0, 5, 6, 1], "labels": [-100, 5, 6, 1]}] * 4)
    table = pa.Table.from_pylist(alpaca)
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    yield "a.parquet", "alpaca", (folder / "a.parquet").read_bytes()
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    yield "a.arrow", "alpaca", (folder / "a.arrow").read_bytes()


def config_of(path: Path, kind: Any, more: dict[str, Any]) -> Config:
    template = {"chat_template": "chatml"} if kind == "chat_template" else {}
    entry = {"path": str(path), "type": kind} | template
    keys = {"base_model": "-", "learning_rate": 1e-4, "adapter": "lora", "lora_target_linear": True}
    return Config.model_validate(keys | {"datasets": [entry], "sequence_len": 64} | more)


def test_data_files(tmp_path, make_tokenizer):
    chosen, tokenizer, good = random.Random(0), make_tokenizer(), 0
    seeds = list(files(tmp_path))
    for _ in range(DATA_FILES):
        name, kind, content = chosen.choice(seeds)
        path = tmp_path / name
        path.write_bytes(mutated_bytes(content, chosen))
        more = chosen.choice([{}, {"on_bad_row": "skip"}, {"excess_length_strategy": "raise"}])
        try:
            good += len(prepare(config_of(path, kind, more), tokenizer).train) > 0
        except DataError as error:
            check_told(str(error))
            assert str(path) in str(error) or "datasets[0]" in str(error), error
    assert DATA_FILES / 20 < good < DATA_FILES * 0.9
    left = {path.name.partition("-")[0] for path in (tmp_path / "prepared_data").glob("*")}
    assert left == {"data"}  # and no folder of one that was refused


def test_runs_on_data_files(tmp_path, config_file):
    """Through the command line: trained and saved, or exit code 3 and no output."""
    chosen, codes, seeds = random.Random(1), {0: 0, 3: 0}, list(files(tmp_path))
    for _ in range(RUNS):
        name, kind, content = chosen.choice(seeds)
        path = tmp_path / name
        path.write_bytes(mutated_bytes(content, chosen))
        config = config_file(path)
        arguments = ["--set", "max_steps=1", "--set", f"datasets[0].type={kind or ''}"]
        arguments += ["--set", "datasets[0].chat_template=chatml"] if kind == "chat_template" else []
        done = CliRunner().invoke(train, [str(config), *arguments])
        assert (tmp_path / "out").exists() == (done.exit_code == 0), done.output
        if done.exit_code:
            assert isinstance(done.exception, SystemExit), done.exception
            check_told(done.stderr)
        codes[done.exit_code] += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert all(codes.values()), codes
