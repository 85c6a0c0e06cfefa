"""What nvcc makes of every kernel of csrc/cuda for every shipped arch, without a GPU.

    python -m bench.hardware_cuda [STEM ..]    a line per kernel and arch

Warnings are errors, and so is a register that ptxas spills. What the code asks of a chip is read off the
object with cuobjdump: registers, shared memory, and how many of its instructions move 16 bytes.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench._kernels import Row, base, plain_names, read_each, run, sources
from pyfastlora._jit import CompileError
from pyfastlora.ops import _native_gpu

STRICT = ("-Werror", "all-warnings", "-Xptxas", "-warn-spills,-Werror", "-Xcompiler", "-Werror")
FLAGS = (*_native_gpu.NVCC_FLAGS, *STRICT)
REGISTERS = 65536  # of a multiprocessor, on all of them
# Threads that fit on a multiprocessor: CUDA programming guide, table of compute capabilities.
THREADS = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}


def why_not() -> str | None:
    """What is missing to compile and to read, or None."""
    if _native_gpu.find_toolkit() is None:
        return "needs nvcc (pip install 'pyfastlora[nvcc]')"
    if _cuobjdump() is None:
        return "needs cuobjdump, of a CUDA toolkit or of the triton wheel"
    return None if shutil.which("c++filt") else "needs c++filt"


def compiled(files: Sequence[Path] | None = None) -> dict[Path, list[Row] | CompileError]:
    """Of each file a row per kernel and arch, or what nvcc or ptxas said.

    kernel, instance, arch; threads (of a block at most; None without launch bounds); registers; stack and
    shared: bytes; then counts of instructions: loads and stores (global), loads_16 and stores_16 (those of 16
    bytes), copies_16 (from global into shared memory), local (loads and stores of what has no register), mma,
    calls (of a division in 64 bits, for example).
    """
    toolkit = _native_gpu.find_toolkit()
    made_by = f"{toolkit} {FLAGS} {_native_gpu.SHIPPED}"
    return read_each(sources() if files is None else files, made_by, _read)


def resident(row: Row) -> int:
    """Threads that the registers let be on a multiprocessor at once."""
    per_block = -(-row["registers"] // 8) * 8 * row["threads"]  # a warp gets them in steps of 256
    return int(min(REGISTERS // per_block * row["threads"], THREADS[row["arch"]]))


def _read(file: Path, folder: Path) -> list[Row]:
    toolkit, tool = _native_gpu.find_toolkit(), _cuobjdump()
    assert toolkit and tool
    made = folder / "kernels.o"
    run(toolkit.command, *FLAGS, *_native_gpu.targets(_native_gpu.SHIPPED), "-c", file, "-o", made)
    rows: list[Row] = []
    found = (_by_arch(run(tool, option, made)) for option in ("--dump-resource-usage", "-elf", "-sass"))
    for (arch, usage), (_, elf), (_, sass) in zip(*found, strict=True):
        bounds = {name: _threads(text) for name, text in _parts(r"^\.nv\.info\.(\S+)$", elf)}
        counts = {name: _count(text) for name, text in _parts(r"^\t\tFunction : (\S+)$", sass)}
        for name, text in _parts(r"^ Function (\S+):$", usage):
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
            rows.append(
                {"instance": name, "arch": arch, "threads": bounds[name], "registers": numbers["REG"]}
                | {"stack": numbers["STACK"], "shared": numbers["SHARED"], **counts[name]}
            )
    names = plain_names([row["instance"] for row in rows]) if rows else []
    return [{"kernel": base(name), **row, "instance": name} for name, row in zip(names, rows, strict=True)]


def _by_arch(dump: str) -> Iterator[tuple[str, str]]:
    """("sm_90", text) of every machine code in what cuobjdump printed; PTX is left out."""
    for part in re.split(r"^Fatbin elf code:$", dump, flags=re.MULTILINE)[1:]:
        text = part.partition("\nFatbin ptx code:")[0]
        found = re.search(r"^arch = (\w+)$", text, re.MULTILINE)
        assert found
        yield found[1], text


def _parts(title: str, text: str) -> Iterator[tuple[str, str]]:
    """(name, what follows) for every line that matches `title`."""
    found = re.split(title, text, flags=re.MULTILINE)
    return zip(found[1::2], found[2::2], strict=True)


def _threads(elf: str) -> int | None:
    """Of a block, as __launch_bounds__ has it; `elf` is a kernel's section of attributes, and more."""
    found = re.search(r"EIATTR_MAX_THREADS\n.*\n\tValue:\t(\w+) (\w+) (\w+)", elf.partition("\n.nv.")[0])
    return math.prod(int(number, 16) for number in found.groups()) if found else None


def _count(sass: str) -> dict[str, int]:
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(times for op, times in ops.items() if re.match(pattern, op))

    return {
        "loads": count(r"LDG\."),
        "loads_16": count(r"LDG\..*128"),
        "stores": count(r"STG\."),
        "stores_16": count(r"STG\..*128"),
        "copies_16": count(r"LDGSTS\..*128"),
        "local": count(r"LDL|STL"),
        "mma": count(r"HMMA"),
        "calls": count(r"CALL"),
    }


def _cuobjdump() -> str | None:
    """Of the toolkit, on PATH, or in the triton wheel."""
    toolkit = _native_gpu.find_toolkit()
    candidates = [str(toolkit.root / "bin" / "cuobjdump")] if toolkit else []
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next(filter(None, map(shutil.which, [*candidates, "cuobjdump"])), None)


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    wanted = [file for file in sources() if not sys.argv[1:] or file.stem in sys.argv[1:]]
    for file, rows in compiled(wanted).items():
        if isinstance(rows, CompileError):
            sys.exit(f"{file.name}: {rows}")
        for row in rows:
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
