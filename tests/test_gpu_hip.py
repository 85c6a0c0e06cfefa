"""csrc/cuda is HIP too: what clang makes of it for AMD's chips, where a clang that compiles HIP can be had.

`python -m bench.hardware_hip --fetch` makes it so on Debian, without a GPU and without ROCm.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import _kernels, hardware_hip  # noqa: E402
from pyfastlora._jit import CompileError  # noqa: E402

# Written for NVIDIA's tensor cores: here their products are FMAs, of more values than there are registers.
SPILLING = {"shrink", "expand", "walk_down", "few_rows"}
WHY_NOT = hardware_hip.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="session")
def compiled():
    return hardware_hip.compiled()


@pytest.mark.parametrize("file", _kernels.sources(), ids=lambda file: file.stem)
def test_compiles_for_amd(file, compiled):
    rows = compiled[file]
    if isinstance(rows, CompileError):
        pytest.fail(str(rows), pytrace=False)
    launches = " launch(" in file.read_text()
    assert {row["arch"] for row in rows} == (set(hardware_hip.ARCHS) if launches else set())
    for row in rows:
        assert row["shared"] <= 64 << 10, row
        assert row["kernel"] in SPILLING or (row["spills"] == 0 and row["stack"] == 0), row


def test_passes_over_memory_are_in_16_bytes(compiled):
    for name, loads, stores in (("glu", 1, 1), ("dequant_4bit", 0, 4), ("dropout_apply", 1, 1)):
        rows = compiled[_kernels.CSRC / "cuda" / f"{name}.cu"]
        wide = [row for row in rows if re.search(r"float, 4>|f16, 8>|runs<", row["instance"])]
        assert wide and all(row["loads_16"] >= loads and row["stores_16"] >= stores for row in wide)


NESTED = """
#include "{csrc}/cuda/decode_4bit.h"
extern "C" __global__ void nested(float *x) {{ *x = fastlora::gpu::nested_scale(x[0], x[1], x[2]); }}
"""


@pytest.mark.parametrize("arch", hardware_hip.ARCHS)
def test_nested_scales_are_rounded_twice(arch, tmp_path):
    """Fused into one operation, they would not be bitsandbytes'."""
    file, made = tmp_path / "nested.cu", tmp_path / "nested.s"
    file.write_text(NESTED.format(csrc=_kernels.CSRC))
    clang = hardware_hip.find_clang()
    options = ("-x", "hip", f"--offload-arch={arch}", "--offload-device-only", "-S", "-o", made)
    _kernels.run(*clang.command, *hardware_hip.FLAGS, *options, file, env=clang.env)
    assert re.findall(r"\bv_(?:dual_)?(mul|add|fma|fmac|mad|mac)_f32", made.read_text()) == ["mul", "add"]


def test_a_mistake_is_seen(tmp_path):
    """Of two kinds: what HIP lacks, and a kernel that keeps an array in memory."""
    files = [tmp_path / "lacks.cu", tmp_path / "indexes.cu"]
    files[0].write_text("__global__ void k(float *x) { *x = __ldcs(x) + no_such(*x); }\n")
    files[1].write_text(
        '#include <hip/hip_runtime.h>\nextern "C" __global__ void indexes(float *x, int at) {\n'
        "    float v[64];\n    for (int i = 0; i < 64; ++i) v[i] = x[i];\n    v[at] = v[at + 1];\n"
        "    x[65] = v[at + 2];\n}\n"
    )
    lacks, indexes = hardware_hip.compiled(files).values()
    assert isinstance(lacks, CompileError) and "no_such" in str(lacks)
    assert [(row["arch"], row["instance"]) for row in indexes] == [(a, "indexes") for a in hardware_hip.ARCHS]
    assert any(row["stack"] for row in indexes)
