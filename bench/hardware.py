"""`python -m bench.hardware`: writes docs/hardware.md, how far every kernel has been taken on every chip.

One half of the page is known without a compiler (ops, backends, archs, tests, results), and a test holds the
page to it. The other half is what nvcc, clang and Triton make of the kernels; where one of them is missing,
what the page has from it stays.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click

from bench import hardware_cuda, hardware_hip
from bench._environment import ROOT
from bench._kernels import Row
from bench._results import HOME, Results
from bench._tables import markdown
from pyfastlora._jit import CompileError
from pyfastlora.ops import _native, _native_gpu, all_ops

PAGE = ROOT / "docs" / "hardware.md"
COMPILED = "## What the compilers make of them\n"
TRITON_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100")

HEAD = """\
# How far the kernels have been taken

Of every op and every chip this page says what has been done, and nothing else counts:

- **c**, compiled for that very arch, with the options of a user's build, and with no register spilled
  unless the tables below say so. For AMD's chips that is device code, which is not linked, let alone run;
- **v**, verified on the CPU itself;
- **e**, verified in an emulator that runs the GPU's source as C++, by the ways that this chip takes: before
  sm_80, and on AMD's chips, products are FMAs and copies wait;
- **i**, verified in Triton's interpreter, float32 and float16;
- **m**, measured: timed on a chip of that arch, with the figures under `bench/results`.

Verified is held to float64 by the accuracy rule, with odd sizes, row pitches and guards beside the outputs.

`python -m bench.hardware` makes this page: what is compiled is read off the tables of its second half, and
what is verified off the tests (`tests/covered.py`). It compiles whatever the compilers at hand can.
"""
NOWHERE = """\
**Nothing has run on a GPU yet**, NVIDIA's or AMD's: no test, no benchmark. `make gpu` does both where there
is one.
"""

# ---- what is known without a compiler ---------------------------------------------------------------


def known(said: str, results: Sequence[Results] | None = None) -> str:
    """The first half of the page. said: the second, for what was compiled."""
    found = _results() if results is None else results
    on_gpus = [each for each in found if each.kind == "gpu"]
    runs = "".join(f"- {_tests(each)}\n" for each in on_gpus) if on_gpus else NOWHERE
    parts = (
        HEAD,
        _backends(),
        "",
        runs,
        "## Ops\n",
        _ops(found, said),
        "",
        "## Timings\n",
        _timings(found),
        "",
        "",
    )
    return "\n".join(parts)


def _backends() -> str:
    def names(archs: Iterable[str]) -> str:
        return ", ".join(arch.removeprefix("sm_") for arch in archs)

    nvidia, amd = ([arch for arch in TRITON_ARCHS if arch.startswith(kind)] for kind in ("sm_", "gfx"))
    rows = [
        ("cpu", ", ".join(_native.LEVELS), "by its first use"),
        ("gpu, NVIDIA", f"sm {names(_native_gpu.SHIPPED)}, and PTX", "by nvcc, and linked"),
        ("gpu, AMD", names(hardware_hip.ARCHS), "by clang: device code only"),
        ("triton, NVIDIA", f"sm {names(nvidia)}", "ahead of time"),
        ("triton, AMD", names(amd), "ahead of time"),
    ]
    return markdown(("backend", "archs", "compiled"), rows, left=3)


# The file of an op's kernels, where it has another name than the op.
FILES = {"glu_forward": "glu", "glu_backward": "glu"}
# dropout_mask draws with torch's generator, so that masks are PEFT's; its kernel packs them.
GPU_FILES = {**FILES, "dropout_mask": "dropout_pack"}
ARCHS = {"gpu": (*_native_gpu.SHIPPED, *hardware_hip.ARCHS), "triton": TRITON_ARCHS}


def _ops(results: Sequence[Results], said: str) -> str:
    """A row per op of the dispatcher, a column per backend and arch."""
    made, verified, timed = _compiled(said), _verified(), {timing[1:] for timing in _timed(results)}
    rows = []
    for op in all_ops():
        cells = ["v" * (op.name in verified["cpu"]) + " m" * (("cpu", "", op.name) in timed)]
        for backend, archs in ARCHS.items():
            file = (GPU_FILES if backend == "gpu" else FILES).get(op.name, op.name)
            for arch in archs:
                marks = {
                    "c": (backend, file, arch) in made,
                    "i": backend == "triton" and op.name in verified["interpreted"],
                    "e": backend == "gpu" and op.name in verified[_way(file, arch)],
                    "m": (backend, arch, op.name) in timed,
                }
                cells.append(" ".join(mark for mark, there in marks.items() if there) or "-")
        rows.append([op.name, *cells])
    head = [f"{backend} {arch.removeprefix('sm_')}" for backend, archs in ARCHS.items() for arch in archs]
    return markdown(("op", "cpu", *head), rows, left=len(head) + 2)


def _compiled(said: str) -> set[tuple[str, str, str]]:
    """(backend, file, arch) of every file that has a line with that arch's registers in the tables of the
    page's second half.
    """
    found = set()
    for compiler, text in _sections(said).items():
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
        ]
        for row in lines[2:]:
            cells = dict(zip(lines[0], row, strict=True))
            backend = "triton" if compiler == "Triton" else "gpu"
            found |= {
                (backend, cells["file"], arch) for arch in ARCHS[backend] if cells.get(arch, "").isdigit()
            }
    return found


def _verified() -> dict[str, set[str]]:
    """The ops that tests verify without a GPU, by ways of doing so."""
    command = [sys.executable, str(ROOT / "tests" / "covered.py")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    said = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {way: set(ops) for way, ops in json.loads(said.splitlines()[-1]).items()}


def _way(file: str, arch: str) -> str:
    """Which emulation takes the ways of the arch: the plain one where they differ at all."""
    source = (ROOT / "csrc" / "cuda" / f"{file}.cu").read_text()
    differs = re.search(r'has_mma|\bmma<|"(skinny|lora_grad)\.h"', source)
    return "plain" if differs and arch.startswith("gfx") else "emulated"


def _timings(results: Sequence[Results]) -> str:
    ops: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for machine, backend, arch, op in _timed(results):
        ops[machine, backend, arch].add(op)
    rows = [(*where, ", ".join(sorted(names))) for where, names in sorted(ops.items())]
    return markdown(("machine", "backend", "arch", "ops"), rows, left=4)


def _timed(results: Sequence[Results]) -> Iterator[tuple[str, str, str, str]]:
    """(machine, backend, arch of a GPU, op) of every timing of a compiled implementation of ours."""
    for each in results:
        found = each.environment
        machine = found["gpu"] if each.kind == "gpu" else f"{found['cpu']}, {found['cores']} cores"
        for row in each.rows:
            if row.get("role") == "ours" and row["variant"] in ("cpu", "gpu", "triton"):
                backend = row["variant"]
                arch = "" if backend == "cpu" else found["arch"].partition(":")[0]
                yield machine, backend, arch, row["op"]


def _tests(results: Results) -> str:
    """What the tests came to on a GPU."""
    found = [row for row in results.rows if row["step"] == "tests" and "passed" in row]
    said = "".join(f": {row['passed']} tests passed, {row['failed']} failed" for row in found)
    return f"{results.environment['gpu']}, commit {results.environment['commit']}{said or ': no tests'}"


def _results() -> list[Results]:
    found = [Results.read(path) for path in sorted(HOME.glob("*/*.json"))]
    return [each for each in found if each.kind in ("ops", "gpu")]


# ---- what the compilers say ---------------------------------------------------------------


def compiled(page: str) -> str:
    """The second half: a section per compiler, or what `page` has from one that is missing."""
    old = _sections(page.partition(COMPILED)[2])
    no_triton = None if importlib.util.find_spec("triton") else "needs Triton"
    text = COMPILED
    for name, why_not, section in (
        ("CUDA", hardware_cuda.why_not(), _cuda),
        ("HIP", hardware_hip.why_not(), _hip),
        ("Triton", no_triton, _triton),
    ):
        if why_not:
            click.echo(f"{name}: left as it was: {why_not}", err=True)
        body = old.get(name, "") if why_not else section()
        text += f"\n### {name}\n\n{body.strip()}\n"
    return text


def _sections(said: str) -> dict[str, str]:
    """Of the second half, by compiler."""
    return dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", said, re.MULTILINE | re.DOTALL))


FORMS = "A line is a kernel in all its forms (dtypes, widths); registers are the most that one of them takes."
CUDA = """\
By {toolkit}. {forms} *Resident* are the threads whose registers fit on a multiprocessor at once, *shared* is
static shared memory in bytes. The last four columns count instructions: loads, stores and copies into shared
memory of 16 bytes, and products of the tensor cores.
"""
HIP = """\
By {version}: device code. {forms} They are a lane's vector registers; *spilled* is how many more were wanted.
The kernels that multiply are written for NVIDIA's tensor cores and make their products of FMAs here.
"""
TRITON = """\
By Triton {version}, in the shipped configurations. {forms} *Spilled* is in bytes of a thread, *shared* in
bytes of a program.
"""


def _cuda() -> str:
    def cells(forms: list[Row]) -> list[str]:
        counts = [_span(forms, key) for key in ("loads_16", "stores_16", "copies_16", "mma")]
        resident = str(min(map(hardware_cuda.resident, forms)))
        registers = _registers(forms, _native_gpu.SHIPPED)
        return [_span(forms, "threads"), *registers, resident, _most(forms, "shared"), *counts]

    head = ("threads", *_native_gpu.SHIPPED, "resident", "shared", "loads", "stores", "copies", "mma")
    text = CUDA.format(toolkit=_native_gpu.find_toolkit(), forms=FORMS)
    return f"{text}\n{_table(_all_rows(hardware_cuda.compiled()), head, cells)}"


def _hip() -> str:
    def cells(forms: list[Row]) -> list[str]:
        registers = _registers(forms, hardware_hip.ARCHS)
        return [_span(forms, "threads"), *registers, _most(forms, "spills"), _most(forms, "shared")]

    clang = hardware_hip.find_clang()
    assert clang
    head = ("threads", *hardware_hip.ARCHS, "spilled", "shared")
    text = HIP.format(version=clang.version, forms=FORMS)
    return f"{text}\n{_table(_all_rows(hardware_hip.compiled()), head, cells)}"


def _triton() -> str:
    import triton

    def cells(forms: list[Row]) -> list[str]:
        return [*_registers(forms, TRITON_ARCHS), _most(forms, "spills"), _most(forms, "shared")]

    # In a process of its own: it replaces Triton's driver.
    code = "import json; from bench.hardware_triton import rows; print(json.dumps(rows()))"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows: list[Row] = json.loads(said.splitlines()[-1])
    for row in rows:
        row["instance"] = f"{row['case']} {row['config']}"
    text = TRITON.format(version=triton.__version__, forms=FORMS)
    table = _table(((row["stem"], row) for row in rows), (*TRITON_ARCHS, "spilled", "shared"), cells)
    return f"{text}\n{table}"


def _all_rows(outcomes: Mapping[Path, list[Row] | CompileError]) -> Iterator[tuple[str, Row]]:
    for file, rows in outcomes.items():
        if isinstance(rows, CompileError):
            raise click.ClickException(f"{file.name}: {rows}")
        yield from ((file.stem, row) for row in rows)


def _table(
    rows: Iterable[tuple[str, Row]], head: Sequence[str], cells: Callable[[list[Row]], list[str]]
) -> str:
    """A line per kernel of a file; cells(forms): of all its forms on all archs."""
    kernels: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for file, row in rows:
        kernels[file, row["kernel"]].append(row)
    lines = [
        [*where, str(len({row["instance"] for row in forms})), *cells(forms)]
        for where, forms in kernels.items()
    ]
    return markdown(("file", "kernel", "forms", *head), lines, left=2)


def _registers(forms: list[Row], archs: Sequence[str]) -> list[str]:
    return [_most([row for row in forms if row["arch"] == arch], "registers") for arch in archs]


def _most(forms: list[Row], key: str) -> str:
    return str(max(row[key] for row in forms))


def _span(forms: list[Row], key: str) -> str:
    least, most = min(row[key] for row in forms), max(row[key] for row in forms)
    return str(most) if least == most else f"{least}-{most}"


@click.command()
@click.option("--known", "only_known", is_flag=True, help="Leave what the compilers said as it is.")
def main(only_known: bool) -> None:
    """Write docs/hardware.md.

    \b
      python -m bench.hardware
      python -m bench.hardware --known       after a benchmark, or a new op
    """
    page = PAGE.read_text() if PAGE.exists() else ""
    second = COMPILED + page.partition(COMPILED)[2] if only_known else compiled(page)
    PAGE.write_text(known(second) + second)
    click.echo(f"written to {PAGE}")


if __name__ == "__main__":
    main()
