"""Rows of a dataset: JSON, CSV, text (gzip too), Parquet or Arrow files, a folder of them, or the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pyfastlora.trainer.config import DatasetKeys, SourceKeys
from pyfastlora.trainer.errors import DataError, HubError

_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


class NumberedRow(NamedTuple):
    """A row and where it is, for messages: file:line where the format has lines, else file and row number."""

    where: str
    values: Any


class Source(Protocol):
    """Where the rows of one dataset are."""

    def rows(self) -> Iterator[NumberedRow]:
        """The rows, in order, read as they are asked for. Raises DataError for what cannot be read."""
        ...

    def digest(self, into: Digest) -> None:
        """Add the content, byte for byte, and not its place or date."""
        ...


class Digest(Protocol):
    """A hash of hashlib's."""

    def update(self, data: bytes, /) -> None: ...


def open_source(dataset: SourceKeys, key: str, streaming: bool = False) -> Source:
    """The source of one entry of the configuration.

    `key` is the entry's own name, such as datasets[0]. streaming: what the hub has is read from there as it
    is needed, instead of downloaded first. Raises DataError where something is missing; what a
    row means is not looked at here.
    """
    path = Path(os.path.expanduser(dataset.path))
    if path.is_file():
        if dataset.data_files:
            raise DataError(
                f"{key}.data_files: {dataset.path} is a file itself; data_files are looked up in a folder"
            )
        return Files.of([path], dataset, key)
    if path.is_dir():
        return Files.of(_files_in(path, dataset, key), dataset, key)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset.path) and _format_of(path) is None:
        return _hub(dataset, key, streaming)
    if any(c in dataset.path for c in "*?["):
        found = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
        if found:
            return Files.of(found, dataset, key)
        raise DataError(f"{key}.path: {dataset.path} matches no file (looked in {Path.cwd()})")
    raise DataError(f"{key}.path: {dataset.path}: no such file or folder (looked in {Path.cwd()})")


def read_rows(dataset: DatasetKeys, key: str, streaming: bool = False) -> Iterator[NumberedRow]:
    """The rows of one entry that belong to its shard."""
    rows = open_source(dataset, key, streaming).rows()
    return itertools.islice(rows, dataset.shards_idx, None, dataset.shards or 1)


@dataclass(frozen=True)
class Files:
    """Files, each with its format, in order."""

    files: tuple[tuple[Path, str], ...]

    @classmethod
    def of(cls, paths: Sequence[Path], dataset: SourceKeys, key: str) -> Files:
        """Raises DataError for a file whose format is not known."""
        return cls(tuple((path, _kind(path, dataset.ds_type, key)) for path in paths))

    def rows(self) -> Iterator[NumberedRow]:
        for path, kind in self.files:
            yield from _guarded(_READERS[kind], path)

    def digest(self, into: Digest) -> None:
        for path, kind in self.files:
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
            packed = path.suffix.lower() == ".gz"
            into.update(f"{kind} {packed} ".encode() + content)


@dataclass(frozen=True)
class HubRows:
    """A dataset of the hub, downloaded or streamed."""

    name: str
    data: Any

    def rows(self) -> Iterator[NumberedRow]:
        return (NumberedRow(f"{self.name}, row {i}", row) for i, row in enumerate(self.data, 1))

    def digest(self, into: Digest) -> None:
        for row in self.data:
            into.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")


def _files_in(folder: Path, dataset: SourceKeys, key: str) -> list[Path]:
    wanted = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files
    if wanted:
        files: list[Path] = []
        for pattern in wanted:
            found = sorted(Path(f) for f in glob.glob(str(folder / pattern), recursive=True))
            if not found:
                raise DataError(f"{key}.data_files: {pattern} matches no file in {folder}")
            files += found
    else:
        files = sorted(f for f in folder.rglob("*") if f.is_file() and _format_of(f))
    if not files:
        raise DataError(f"{key}.path: {folder} holds no {', '.join(_FORMATS)} file")
    return files


def _hub(dataset: SourceKeys, key: str, streaming: bool) -> HubRows:
    import datasets

    try:
        rows = datasets.load_dataset(
            dataset.path,
            dataset.name,
            data_files=dataset.data_files,
            split=dataset.split,
            revision=dataset.revision,
            streaming=streaming,
        )
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"{key}.path: {dataset.path} is no file or folder here, and the hub did not give it: {reason}"
        ) from error
    return HubRows(dataset.path, rows)


def _format_of(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _kind(path: Path, ds_type: str | None, key: str) -> str:
    kind = ds_type or _format_of(path)
    if kind is None:
        raise DataError(
            f"{key}.path: {path}: the name does not tell its format; "
            f"rename it to end in one of {', '.join(_FORMATS)}, or set ds_type"
        )
    return kind


def _guarded(reader: Callable[[Path], Iterator[NumberedRow]], path: Path) -> Iterator[NumberedRow]:
    """The reader's rows, its failures reworded."""
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text; {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _json(path: Path) -> Iterator[NumberedRow]:
    """One object per line, or one array of objects."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                yield from _json_array(path, line + file.read())
                return
            where = f"{path}:{number}"
            yield NumberedRow(where, _loads(line, where))


def _json_array(path: Path, text: str) -> Iterator[NumberedRow]:
    for number, row in enumerate(_loads(text, str(path)), 1):
        yield NumberedRow(f"{path}, row {number}", row)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise DataError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from None
    except (RecursionError, ValueError):
        raise DataError(
            f"{where}: not JSON that can be read: nested too deeply, or a number too long"
        ) from None


def _csv(path: Path) -> Iterator[NumberedRow]:
    with _open(path, newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield NumberedRow(f"{path}:{rows.line_num}", {k: v for k, v in row.items() if k is not None})
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: not CSV: {error}") from None


def _text(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield NumberedRow(f"{path}:{number}", {"text": line.rstrip("\n")})


def _parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches())
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Parquet: {str(error).splitlines()[0]}") from None


def _arrow(path: Path) -> Iterator[NumberedRow]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches = iter(pyarrow.ipc.open_stream(source))  # what the datasets library writes
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _batches(path, batches)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not Arrow: {str(error).splitlines()[0]}") from None


def _batches(path: Path, batches: Iterator[Any]) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # its lengths and offsets are whatever the file says
        for row in batch.to_pylist():
            number += 1
            yield NumberedRow(f"{path}, row {number}", row)


_READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    "json": _json,
    "csv": _csv,
    "text": _text,
    "parquet": _parquet,
    "arrow": _arrow,
}
