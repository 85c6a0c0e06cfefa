"""What clang makes of every kernel of csrc/cuda for AMD's chips, without a GPU and without ROCm.

    python -m bench.hardware_hip --fetch       Debian's packages into build/hip (41 MB), without root
    python -m bench.hardware_hip [STEM ..]     a line per kernel and arch

Device code only: it is compiled, not linked and not run.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench._environment import ROOT
from bench._kernels import Row, base, plain_names, read_each, run, sources
from pyfastlora._jit import CompileError

ARCHS = ("gfx90a", "gfx942", "gfx1100")
# A loop that clang leaves rolled, where nvcc unrolls it, is slower code and no mistake.
FLAGS = ("-O3", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-pass-failed", "-DFASTLORA_GPU")
FETCHED = ROOT / "build" / "hip"
PACKAGES = (
    "clang-19",
    "libclang-common-19-dev",
    "libclang-cpp19",
    "libllvm19",
    "libamdhip64-dev",
    "rocm-device-libs",
)
# Debian's device libraries are older than these chips; those of the ones before have the same functions.
OLDER = {"942": "940", "1100": "1036"}


@dataclass(frozen=True, slots=True)
class Clang:
    """A clang++ that compiles HIP. env: what it is started in; None for this process's."""

    command: tuple[str, ...]
    version: str
    env: dict[str, str] | None


def why_not() -> str | None:
    """What is missing, or None."""
    if find_clang() is None:
        return "needs a clang++ that compiles HIP: ROCm's, or `python -m bench.hardware_hip --fetch`"
    return None if shutil.which("c++filt") else "needs c++filt"


PROBE = ("-x", "hip", "--offload-device-only", "-include", "hip/hip_runtime.h", "-S", os.devnull)


@functools.cache
def find_clang() -> Clang | None:
    """What was fetched, ROCm's, or one on PATH: the first that compiles a kernel."""
    for clang in _candidates():
        try:
            run(*clang.command, *PROBE, "--offload-arch=gfx90a", "-o", os.devnull, env=clang.env)
            return clang
        except (CompileError, OSError):
            continue
    return None


def _candidates() -> Iterator[Clang]:
    own = FETCHED / "usr" / "lib" / "llvm-19" / "bin" / "clang++"
    if own.exists():
        libraries = next((FETCHED / "usr" / "lib").glob("*-linux-gnu"))
        options = [f"--rocm-path={FETCHED / 'usr'}", f"--rocm-device-lib-path={FETCHED / 'bitcode'}"]
        options += ["-isystem", str(FETCHED / "usr" / "include")]
        yield _clang(own, options, {**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    for name in ("/opt/rocm/llvm/bin/clang++", "amdclang++", "clang++"):
        if program := shutil.which(name):
            yield _clang(Path(program), [], None)


def _clang(program: Path, options: Sequence[str], env: dict[str, str] | None) -> Clang:
    return Clang((str(program), *options), run(program, "--version", env=env).partition("\n")[0], env)


def fetch() -> None:
    """Debian's clang, HIP headers and device libraries, into FETCHED. Needs apt-get, dpkg and a network."""
    part = FETCHED.with_name("hip.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    run("sh", "-c", 'cd "$0" && apt-get download "$@"', part, *PACKAGES)
    for package in part.glob("*.deb"):
        run("dpkg", "-x", package, part)
        package.unlink()
    libraries = part / "bitcode"
    libraries.mkdir()
    for file in part.glob("usr/lib/*/amdgcn/bitcode/*.bc"):
        shutil.copy(file, libraries)
    for new, old in OLDER.items():
        made = libraries / f"oclc_isa_version_{new}.bc"
        if not made.exists():
            shutil.copy(libraries / f"oclc_isa_version_{old}.bc", made)
    shutil.rmtree(FETCHED, ignore_errors=True)
    part.rename(FETCHED)


def compiled(files: Sequence[Path] | None = None) -> dict[Path, list[Row] | CompileError]:
    """Of each file a row per kernel and arch, or what clang said.

    kernel, instance, arch; threads (of a block at most); registers (of a lane, vector) and spills (of them);
    stack and shared: bytes; loads_16 and stores_16: global instructions of 16 bytes.
    """
    clang = find_clang()
    made_by = f"{clang and clang.version} {FLAGS} {ARCHS}"
    return read_each(sources() if files is None else files, made_by, _read)


def _read(file: Path, folder: Path) -> list[Row]:
    clang = find_clang()
    assert clang
    rows = []
    for arch in ARCHS:
        made = folder / f"{arch}.s"
        options = ("-x", "hip", f"--offload-arch={arch}", "--offload-device-only", "-S", "-o", made)
        run(*clang.command, *FLAGS, *options, file, env=clang.env)
        rows += list(_rows_of(made.read_text(), arch))
    names = plain_names([row["instance"] for row in rows]) if rows else []
    return [{"kernel": base(name), **row, "instance": name} for name, row in zip(names, rows, strict=True)]


def _rows_of(assembly: str, arch: str) -> Iterator[Row]:
    code, _, metadata = assembly.partition("amdhsa.kernels:")
    metadata = metadata.partition("amdhsa.target:")[0]
    bodies = re.split(r"^(\S+):\s+; @\1$", code, flags=re.MULTILINE)
    body = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    for text in re.split(r"^  - ", metadata, flags=re.MULTILINE)[1:]:
        said = dict(re.findall(r"^(?: {4})?\.(\w+): +(\S+)$", text, re.MULTILINE))
        ops = body[said["name"]]
        yield {
            "instance": said["name"],
            "arch": arch,
            "threads": int(said["max_flat_workgroup_size"]),
            "registers": int(said["vgpr_count"]),
            "spills": int(said["vgpr_spill_count"]),
            "stack": int(said["private_segment_fixed_size"]),
            "shared": int(said["group_segment_fixed_size"]),
            "loads_16": len(re.findall(r"\b(?:global|flat)_load_(?:dwordx4|b128)\b", ops)),
            "stores_16": len(re.findall(r"\b(?:global|flat)_store_(?:dwordx4|b128)\b", ops)),
        }


def main() -> None:
    if sys.argv[1:] == ["--fetch"]:
        fetch()
    if reason := why_not():
        sys.exit(reason)
    if sys.argv[1:] == ["--fetch"]:
        sys.exit()
    wanted = [file for file in sources() if not sys.argv[1:] or file.stem in sys.argv[1:]]
    for file, rows in compiled(wanted).items():
        if isinstance(rows, CompileError):
            sys.exit(f"{file.name}: {rows}")
        for row in rows:
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
