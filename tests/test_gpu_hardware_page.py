"""docs/hardware.md says what is so today: its first half to the letter, its tables by the kernels in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import hardware, hardware_cuda, hardware_hip  # noqa: E402
from bench._results import Results  # noqa: E402
from pyfastlora.ops import all_ops  # noqa: E402

TENSOR_CORES = {"dora_norm_tiles"}  # nothing launches it where there are none
BOUNDS = r"(?:\w+\([^()]*\)\s+)?"
KERNELS = re.compile(rf"__global__\s+void\s+{BOUNDS}(\w+)\(")


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL))


def column(table: str, at: int) -> list[str]:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]
    return [row[at] for row in rows[2:]]


@pytest.fixture(scope="module")
def verified():
    """What the tests cover: collected once."""
    pytest.importorskip("triton", reason="needs Triton: pip install pyfastlora[triton]")
    return hardware._verified()


@pytest.fixture(autouse=True)
def collected_once(request, monkeypatch):
    if "verified" in request.fixturenames:
        found = request.getfixturevalue("verified")
        monkeypatch.setattr(hardware, "_verified", lambda: found)


def test_the_page_is_up_to_date(verified):
    first, compiled, rest = hardware.PAGE.read_text().partition(hardware.COMPILED)
    assert first == hardware.known(compiled + rest), "run `python -m bench.hardware --known`"


def test_what_is_not_covered_is_not_said(verified, monkeypatch):
    """Neither what no test is about, nor what no compiler has a line for."""
    assert set(verified) == {"emulated", "plain", "interpreted", "cpu"}
    assert {"lora_shrink", "lora_expand", "lora_grad", "lora_backward", "matmul_4bit", "dora_norm"} == set(
        verified["plain"]
    )
    tables = "### CUDA\n\n| file | sm_80 | sm_90 |\n| - | - | - |\n| lora_grad | 32 |  |\n"

    def cells(op):
        (line,) = (row for row in hardware.known(tables, []).splitlines() if row.startswith(f"| {op} "))
        return [cell.strip() for cell in line.split("|")[3:13]]

    assert cells("lora_grad") == ["c e", *["e"] * 8, "i"]
    gone = {way: ops - {"lora_grad"} if way == "plain" else ops for way, ops in verified.items()}
    monkeypatch.setattr(hardware, "_verified", lambda: gone)
    assert cells("lora_grad") == ["c e", *["e"] * 5, *["-"] * 3, "i"]
    assert cells("glu_forward") == [*["e"] * 9, "i"]


def test_every_kernel_is_in_its_table():
    said = sections(hardware.PAGE.read_text())
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    there = {name for path in sources for name in KERNELS.findall(path.read_text())}
    for compiler in ("CUDA", "HIP"):
        wanted = there - (TENSOR_CORES if compiler == "HIP" else set())
        assert set(column(said[compiler], 1)) == wanted, f"{compiler}: run `python -m bench.hardware`"
    launchers = {path.stem for path in (ROOT / "kernels_triton").glob("[!_]*.py")}
    assert set(column(said["Triton"], 0)) == launchers, "run `python -m bench.hardware`"


def test_a_chip_counts_once_it_has_run(verified):
    nothing = hardware.known("", [])
    assert hardware.NOWHERE in nothing
    ops = nothing.partition("## Ops")[2].partition("## Timings")[0]
    assert column(ops, 0) == [op.name for op in all_ops()] and " m " not in ops

    row = {"step": "ops", "op": "glu_forward", "variant": "gpu", "role": "ours"}
    tests = {"step": "tests", "passed": 41, "failed": 2}
    environment = {"gpu": "NVIDIA H200", "arch": "sm_90", "commit": "0123456"}
    other = [row | {"op": "dora_grad", "role": "other"}, row | {"op": "dora_norm", "variant": "reference"}]
    found = hardware.known("", [Results("gpu", environment, {}, [tests, row, *other])])
    assert hardware.NOWHERE not in found
    assert "- NVIDIA H200, commit 0123456: 41 tests passed, 2 failed\n" in found
    (line,) = (line for line in found.splitlines() if line.startswith("| glu_forward "))
    assert line.count(" m ") == 1 and [cell.strip() for cell in line.split("|")][6] == "e m"
    assert re.search(r"^\| NVIDIA H200 +\| gpu +\| sm_90 +\| glu_forward +\|$", found, re.MULTILINE)
    assert found.count(" m |") + found.count(" m  ") == 1


def test_without_a_compiler_its_table_stays(monkeypatch):
    page = hardware.PAGE.read_text()
    monkeypatch.setattr(hardware_cuda, "why_not", lambda: "needs nvcc")
    monkeypatch.setattr(hardware_hip, "why_not", lambda: "needs clang")
    monkeypatch.setattr(hardware, "_triton", lambda: "\nfresh\n")
    made = hardware.compiled(page)
    old, new = sections(page), sections(made)
    assert made.startswith(hardware.COMPILED) and new.keys() == old.keys()
    assert new["CUDA"].strip() == old["CUDA"].strip() and new["HIP"].strip() == old["HIP"].strip()
    assert new["Triton"].strip() == ("fresh" if importlib.util.find_spec("triton") else old["Triton"].strip())
