"""From C++ sources to a library on disk, once per machine: what the kernels and the host module share.

    find      prebuilt in the wheel, then the cache; entries are named after a hash of all that shaped them
    build     lock -> look again -> compile in a fresh .build-* directory -> publish by renaming a directory

A lock dies with its process and a directory appears whole or not at all: a killed build leaves nothing that
a later one can trip over, and of many processes that start cold one compiles. Importing this does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyfastlora
from pyfastlora._cache import cache_dirs, distrust, locked, sweep

T = TypeVar("T")

PREBUILT = Path(__file__).parent / "_prebuilt"
MANIFEST = "manifest.json"
TAIL = 20  # lines of a failed compilation that are shown


class BuildError(RuntimeError):
    """There is no library. `str(error)` is one sentence; `report` may add the compiler's last lines."""

    def __init__(self, sentence: str, report: str | None = None) -> None:
        super().__init__(sentence)
        self.report = report or sentence


class CompileError(Exception):
    """The compiler refused; the text is what it printed."""


@dataclass(frozen=True, slots=True)
class Compiler:
    command: tuple[str, ...]
    version: str  # the first line of --version; "" if it would not say

    def __str__(self) -> str:
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one library is made. All of it, with the content of the files, is hashed into the entry's name."""

    name: str
    library: str  # file name
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]
    flavour: str  # what else the binary is tied to, e.g. "torch cuda13"
    # compile(recipe, compiler, directory) leaves `library` in `directory`; raises CompileError.
    compile: Callable[[Recipe, Compiler, Path], None]
    archs: tuple[str, ...] = ()  # of GPUs. Not part of the key: an entry that has them all will do
    toolkit: str = ""  # the GPU's compiler beside the host's, as it is shown: "nvcc 13.0.88"

    def key(self) -> str:
        digest = hashlib.sha256()
        for path in (*self.sources, *self.headers):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
        flags = (self.flags, extra_flags(), self.link)
        target = (self.library, self.flavour, sys.platform, platform.machine())
        digest.update(repr((flags, target)).encode())
        return digest.hexdigest()[:16]


def csrc() -> Path:
    """The C++ sources: inside the package when it came as a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def extra_flags() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("FASTLORA_CXXFLAGS", "")))


def find_compiler() -> Compiler | None:
    """The program that CXX names, else the first of c++, g++, clang++ on PATH. None: none of them starts."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [tuple(named)] if named else [("c++",), ("g++",), ("clang++",)]:
        if shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
                return Compiler(command, "" if said.returncode else said.stdout.partition("\n")[0].strip())
    return None


def manifest(entry: Path) -> dict[str, Any] | None:
    """What the entry says about itself; None where it is absent or does not hold the library it describes."""
    try:
        said = json.loads((entry / MANIFEST).read_text())
        return said if (entry / said["library"]).stat().st_size == said["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(recipe: Recipe, compiler: Compiler | None) -> Iterator[Path]:
    """Libraries of this recipe that are already on disk, best first.

    Without a compiler, say in a slim image made from a fat one, whatever compiler made an entry will do.
    """
    key = recipe.key()
    for directory in (PREBUILT, *cache_dirs()):
        pattern = f"{recipe.name}-{key}-*"
        if compiler is not None and directory != PREBUILT and not recipe.archs:
            pattern = _entry_name(recipe, key, compiler)
        for entry in sorted(directory.glob(pattern)):
            trusted = directory == PREBUILT or not (distrust(directory) or distrust(entry))
            if trusted and (said := manifest(entry)) and {*recipe.archs} <= {*said.get("archs", ())}:
                yield entry / said["library"]


def obtain(recipe: Recipe, load: Callable[[Path], T]) -> T:
    """`load(library)`, of the library found or, unless FASTLORA_JIT=0, built now. Raises BuildError."""
    broken = ""
    for library in find(recipe, find_compiler()):
        try:
            return load(library)
        except (OSError, ImportError) as error:
            broken = f"{library} does not load: {error}; "
    if os.environ.get("FASTLORA_JIT") == "0":
        raise BuildError(f"{broken}not built, and FASTLORA_JIT=0 forbids it: run `fastlora build`")
    try:
        library = build(recipe)
    except BuildError as error:
        raise BuildError(f"{broken}{error}", error.report) from None
    try:
        return load(library)
    except (OSError, ImportError) as error:
        raise BuildError(f"{library} does not load: {error}; run `fastlora build --force`") from None


def build(recipe: Recipe, *, force: bool = False) -> Path:
    """The library in the first cache directory that can be written; compiled unless it is there.

    Raises BuildError.
    """
    compiler = _compiler_or_error()
    refused = []
    for directory in cache_dirs():
        workplace = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := distrust(directory):
                refused.append(reason)
                continue
            workplace = Path(tempfile.mkdtemp(prefix=".build-", dir=directory))
            with locked(directory / f".{recipe.name}.lock"):
                return _build_in(directory, workplace, recipe, compiler, force)
        except OSError as error:
            refused.append(f"{directory}: {error.strerror}")
        finally:
            if workplace:
                shutil.rmtree(workplace, ignore_errors=True)
    raise BuildError(f"not built: no cache directory is usable ({'; '.join(refused)}); set FASTLORA_CACHE")


def build_into(directory: Path, recipe: Recipe) -> Path:
    """The library as an entry of `directory`, which becomes PREBUILT inside a wheel. Raises BuildError."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as workplace:
        return _build_in(directory, Path(workplace), recipe, _compiler_or_error(), force=True)


def compile_directly(
    recipe: Recipe, compiler: Compiler, directory: Path, include: Sequence[str], link: Sequence[str] = ()
) -> None:
    """One compiler process per source, MAX_JOBS at a time, then the link. Needs no build tool."""
    flags = [*(f"-isystem{path}" for path in include), *recipe.flags, *extra_flags()]
    objects = [directory / f"{source.name}.o" for source in recipe.sources]
    pairs = zip(recipe.sources, objects, strict=True)
    run_commands([[*compiler.command, *flags, "-c", source, "-o", made] for source, made in pairs], directory)
    made = directory / recipe.library
    run_commands([[*compiler.command, *objects, *link, *recipe.link, "-o", made]], directory)


def run_commands(commands: Sequence[Sequence[str | Path]], directory: Path) -> None:
    """All of them, in `directory`, MAX_JOBS at a time. Raises CompileError with what the first failed one
    said.
    """

    def run(command: Sequence[str | Path]) -> None:
        words = [str(word) for word in command]
        pipe = subprocess.PIPE
        done = subprocess.run(words, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=directory)
        if done.returncode:
            raise CompileError(f"{shlex.join(words)}\n{done.stdout}")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, commands))


def _build_in(directory: Path, workplace: Path, recipe: Recipe, compiler: Compiler, force: bool) -> Path:
    entry = directory / _entry_name(recipe, recipe.key(), compiler)
    if not force and manifest(entry):
        return entry / recipe.library
    sweep(directory)
    tools = " and ".join(filter(None, (recipe.toolkit, str(compiler))))
    print(
        f"Building pyfastlora's {recipe.name} with {tools}, once, into {entry}; FASTLORA_JIT=0 skips it",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    try:
        recipe.compile(recipe, compiler, workplace)
    except CompileError as error:
        raise _failure(tools, compiler, entry.with_suffix(".log"), str(error)) from None
    staged = workplace / "entry"
    staged.mkdir(mode=0o700)
    os.replace(workplace / recipe.library, staged / recipe.library)
    description = {
        "library": recipe.library,
        "size": (staged / recipe.library).stat().st_size,
        "version": pyfastlora.__version__,
        "flavour": recipe.flavour,
        "archs": recipe.archs,
        "machine": platform.machine(),
        "compiler": ", ".join(filter(None, (recipe.toolkit, compiler.version))),
        "flags": [*recipe.flags, *extra_flags()],
        "seconds": round(time.perf_counter() - started, 2),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (staged / MANIFEST).write_text(json.dumps(description, indent=2) + "\n")
    _publish(staged, entry, aside=workplace / "old", force=force)
    return entry / recipe.library


def _publish(staged: Path, entry: Path, aside: Path, force: bool) -> None:
    if force or not manifest(entry):
        with contextlib.suppress(FileNotFoundError):
            os.replace(entry, aside)
    try:
        os.replace(staged, entry)
    except OSError:
        if not manifest(entry):  # else: without locks another process was first, and its result is as good
            raise


def _compiler_or_error() -> Compiler:
    if compiler := find_compiler():
        return compiler
    tried = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++ and clang++"
    raise BuildError(f"not built: no C++ compiler ({tried} not found); {_remedy(None)}")


def _failure(tools: str, compiler: Compiler, log: Path, output: str) -> BuildError:
    log.write_text(output)
    lines = "\n".join(f"    {line}" for line in output.rstrip().splitlines()[-TAIL:])
    remedy = _remedy(compiler)
    return BuildError(
        f"not built: {tools} failed, log in {log}; {remedy}",
        f"{tools} failed, so the next backend runs. It said\n{lines}\n"
        f"The whole log is in {log}. To fix it, {remedy}.",
    )


def _remedy(failed: Compiler | None) -> str:
    was = failed and os.path.realpath(shutil.which(failed.command[0]) or "")
    for other in ("g++", "clang++"):
        if (found := shutil.which(other)) and os.path.realpath(found) != was:
            return f"run `CXX={other} fastlora build`"
    if failed:
        return "run `fastlora build` once what it reports is repaired"
    for tool, command in (
        ("apt-get", "apt-get install g++"),
        ("dnf", "dnf install gcc-c++"),
        ("apk", "apk add g++"),
        ("conda", "conda install -c conda-forge gxx"),
        ("xcode-select", "xcode-select --install"),
    ):
        if shutil.which(tool):
            return f"run `{command}`"
    return "install g++"


def _entry_name(recipe: Recipe, key: str, compiler: Compiler) -> str:
    made_by = "\n".join((compiler.version, *recipe.archs))
    return f"{recipe.name}-{key}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
