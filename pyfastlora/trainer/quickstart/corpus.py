"""Real text that every Python installation carries: its standard library.

Source files are split three ways by a hash of their path. `base` files are plain text for the base model;
from `train` and `held_out` files come pairs of a function and the first paragraph of its docstring. So
whatever the held-out loss says, it says about files that neither the base nor the adapter has seen.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyfastlora.trainer.errors import UserError

INSTRUCTION = "Say in one sentence what this Python function does."

# Parts of the library that are tables or other people's code, not prose and programs.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "_bundled",
}

_CODE_CHARS = range(60, 600)
_DOC_CHARS = range(20, 160)
FEWEST_PAIRS = 100


@dataclass(frozen=True)
class Pair:
    """A function without its docstring, the docstring's first paragraph on one line, and their file."""

    code: str
    summary: str
    file: str


@dataclass(frozen=True)
class Corpus:
    """base_text: one string per file. The three sets share no file."""

    base_text: tuple[str, ...]
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def share_of(file: str) -> str:
    """The set a file belongs to, by its path below the library: `base` 55 %, `train` 40 %, `held_out` 5 %."""
    percent = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "big") % 100
    return "base" if percent < 55 else "train" if percent < 95 else "held_out"


def read_corpus(library: Path | None = None) -> Corpus:
    """The corpus of a standard library (default: the running Python's).

    Raises UserError where it holds too little text, as on installations that ship it as bytecode or in an
    archive.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    base_text: list[str] = []
    pairs: dict[str, list[Pair]] = {"train": [], "held_out": []}
    for file, text in _sources(library):
        share = share_of(file)
        if share == "base":
            base_text.append(text)
        else:
            pairs[share] += _pairs(file, text)
    base_text += _language_reference()
    train, held_out = (_without_repeats(pairs[share]) for share in ("train", "held_out"))
    known = {pair.summary for pair in train}
    held_out = [pair for pair in held_out if pair.summary not in known]
    if len(train) < FEWEST_PAIRS or len(held_out) < FEWEST_PAIRS // 10:
        raise UserError(
            f"the standard library in {library} has {len(train)} documented functions to train on and "
            f"{len(held_out)} to hold out; quickstart needs {FEWEST_PAIRS} and {FEWEST_PAIRS // 10}"
        )
    return Corpus(tuple(base_text), tuple(train), tuple(held_out))


def write_alpaca(pairs: Sequence[Pair], path: Path) -> None:
    """One alpaca row per pair."""
    rows = ({"instruction": INSTRUCTION, "input": p.code, "output": p.summary, "file": p.file} for p in pairs)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """Path below the library and text of every source file, in a fixed order."""
    files = ((path.relative_to(library), path) for path in library.rglob("*.py"))
    for relative, path in sorted((r, p) for r, p in files if not _LEFT_OUT.intersection(r.parts)):
        try:
            with tokenize.open(path) as file:
                yield relative.as_posix(), file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # what Python itself cannot read is no text to learn from


def _language_reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def _pairs(file: str, text: str) -> Iterator[Pair]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        summary = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        first, last = node.body[0], node.end_lineno
        rest = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : last]
        code = textwrap.dedent("".join(rest)).strip()
        if len(code) in _CODE_CHARS and len(summary) in _DOC_CHARS:
            yield Pair(code, summary, file)


def _without_repeats(pairs: list[Pair]) -> list[Pair]:
    """The first pair of each summary: boilerplate would be learnt by heart and flatter the loss."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.summary, pair)
    return list(first.values())
