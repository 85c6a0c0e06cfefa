"""Rows from every kind of file, and one sentence for every file that is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pyfastlora.trainer.config import DatasetKeys
from pyfastlora.trainer.data.sources import read_rows
from pyfastlora.trainer.errors import DataError

ROWS = [{"text": "one"}, {"text": "two\r\nlines"}, {"text": "你好"}]


def rows_of(path: Path, **keys):
    return [
        row.values for row in read_rows(DatasetKeys(path=str(path), type="completion", **keys), "datasets[0]")
    ]


def write(path: Path, kind: str) -> Path:
    if kind == "jsonl":
        path.write_text("\ufeff\n" + "\n\n".join(json.dumps(r) for r in ROWS), encoding="utf-8")
    elif kind == "crlf":
        path.write_bytes("\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode())
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in ROWS).encode()))
    elif kind == "csv":
        path.write_text('text\none\n"two\r\nlines"\n你好\n', encoding="utf-8", newline="")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import pyarrow

        table = pyarrow.Table.from_pylist(ROWS)
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    "kind, name",
    [
        ("jsonl", "d.jsonl"),
        ("crlf", "d.jsonl"),
        ("json", "d.json"),
        ("gz", "d.jsonl.gz"),
        ("csv", "d.csv"),
        ("parquet", "d.parquet"),
        ("stream", "d.arrow"),
        ("file", "d.arrow"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, kind, name):
    assert rows_of(write(tmp_path / name, kind)) == ROWS


def test_text_files_are_rows_of_lines(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one\r\n\ntwo")
    assert [r["text"] for r in rows_of(tmp_path / "d.txt")] == ["one", "", "two"]


def test_ds_type_names_the_format(tmp_path):
    assert rows_of(write(tmp_path / "data", "jsonl"), ds_type="json") == ROWS


def test_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", "jsonl")
    write(tmp_path / "sub" / "a.csv", "csv")
    (tmp_path / "notes.md").write_text("not data")
    assert rows_of(tmp_path) == ROWS * 2
    assert rows_of(tmp_path, data_files="*.jsonl") == ROWS
    assert rows_of(tmp_path, data_files=["b.jsonl", "sub/*.csv"]) == ROWS * 2


def test_row_numbers_are_lines_of_the_file(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    where = [
        r.where
        for r in read_rows(DatasetKeys(path=str(tmp_path / "d.jsonl"), type="completion"), "datasets[0]")
    ]
    assert where == [f"{tmp_path}/d.jsonl:1", f"{tmp_path}/d.jsonl:4"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": }\n', "d.jsonl:2: not JSON: Expecting value (column 10)"),
        ("d.jsonl", b'{\n  "text": "a"\n}\n', "d.jsonl:1: not JSON: Expecting property name"),
        (
            "d.json",
            b'[{"text": "a"},\n {"text" "b"}]',
            "d.json: not JSON: Expecting ':' delimiter (line 2, column 10)",
        ),
        ("d.jsonl", b"[" * 100_000, "d.jsonl: not JSON"),
        ("d.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "d.jsonl:1: not JSON that can be read"),
        ("d.jsonl", b'{"text": "\xff\xfe"}', "d.jsonl: must be UTF-8 text; invalid start byte at byte 10"),
        ("d.jsonl.gz", b"not gzip", "d.jsonl.gz: cannot be read: Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "d.jsonl.gz: cannot be read"),
        ("d.parquet", b"not parquet", "d.parquet: not Parquet"),
        ("d.arrow", b"not arrow at all", "d.arrow: not Arrow"),
        ("d.csv", b'text\n"' + b"x" * 200_000, "not CSV: field larger than field limit"),
        ("d.bin", b"", "the name does not tell its format"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        rows_of(tmp_path / name)
    assert sentence in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(
        DataError, match=r"datasets\[0\].path: .*nowhere.jsonl: no such file or folder \(looked in"
    ):
        rows_of(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"holds no \.json"):
        rows_of(tmp_path)
    write(tmp_path / "d.jsonl", "jsonl")
    with pytest.raises(DataError, match=r"data_files: \*.csv matches no file"):
        rows_of(tmp_path, data_files="*.csv")
    with pytest.raises(DataError, match="is a file itself"):
        rows_of(tmp_path / "d.jsonl", data_files="*.csv")
