"""What nvcc makes of csrc/cuda for every shipped arch: no warning, no spill, and the accesses that the
kernels are designed around. No GPU is needed; a new file is held to the common limits without being named.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import _kernels, hardware_cuda  # noqa: E402
from pyfastlora._jit import CompileError  # noqa: E402
from pyfastlora.ops import _native_gpu  # noqa: E402

WHY_NOT = hardware_cuda.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@dataclass(frozen=True)
class Limit:
    """resident: threads whose registers must fit on a multiprocessor at once. at_least: instructions; of 16
    bytes, they are what a thread has under way.
    """

    resident: int
    at_least: dict[str, int] = field(default_factory=dict)


# By the beginning of an instance's name; a kernel that is not named has to be as lean as a product. A pass
# over memory needs some 40 KB under way on a multiprocessor: 1024 threads with three loads of 16 bytes, say.
# What multiplies on tensor cores waits less for its threads' number: it copies ahead into shared memory.
COMMON = Limit(512)
PACKS = r".*(float, 4|f16, 8)>"  # bf16 too
LIMITS = {
    "dequant_runs": Limit(1024, {"stores_16": 4}),
    "dequant_each": Limit(1536),
    "dequant_8bit_runs": Limit(1536),
    "dequant_8bit_runs<.*8>": Limit(1536, {"stores_16": 4}),
    f"glu_forward_packs{PACKS}": Limit(1024, {"loads_16": 4, "stores_16": 2}),
    f"glu_backward_packs{PACKS}": Limit(1024, {"loads_16": 3, "stores_16": 3}),
    f"dropout_apply_packs{PACKS}": Limit(1024, {"loads_16": 4, "stores_16": 4}),
    "dropout_pack_words<true>": Limit(1024, {"loads_16": 4}),
    f"dora_grad_rows{PACKS}": Limit(768, {"loads_16": 8, "stores_16": 4}),
    "dora_norm_tiles": Limit(512, {"mma": 8}),
    "dora_norm_tiles<Dense": Limit(512, {"copies_16": 8}),
    "shrink": Limit(512, {"copies_16": 8, "mma": 16}),
    "expand": Limit(512, {"copies_16": 8, "stores_16": 4, "mma": 12}),
    "few_rows": Limit(512, {"loads_16": 16, "mma": 16}),
    # Its sums stay in registers all the way down a block's rows; eight warps keep 16 copies each under way.
    "walk_down": Limit(256, {"copies_16": 16, "mma": 32}),
}


BESIDE_DYNAMIC = 8 << 10  # static_beside_dynamic of csrc/gpu.h


def dynamic_kernels() -> set[str]:
    """The kernels that are launched with dynamic shared memory."""
    files = [*(_kernels.CSRC / "cuda").glob("*.cu"), *(_kernels.CSRC / "cuda").glob("*.h")]
    bodies = [body for file in files for body in file.read_text().split("__global__")[1:]]
    name = re.compile(r"\s+void\s+(?:\w+\([^()]*\)\s+)?(\w+)\(")
    return {found[1] for body in bodies if "FASTLORA_SHARED(" in body and (found := name.match(body))}


def test_the_kernels_with_dynamic_shared_memory_are_found():
    assert dynamic_kernels() == {"dora_norm_tiles", "shrink", "expand", "walk_down"}


@pytest.fixture(scope="session")
def compiled():
    return hardware_cuda.compiled()


@pytest.mark.parametrize("file", _kernels.sources(), ids=lambda file: file.stem)
def test_compiles_within_its_limits(file, compiled):
    rows = compiled[file]
    if isinstance(rows, CompileError):
        pytest.fail(str(rows), pytrace=False)
    launches = " launch(" in file.read_text()
    assert {row["arch"] for row in rows} == (set(_native_gpu.SHIPPED) if launches else set())
    for row in rows:
        what = f"{row['instance']} on {row['arch']}: {row}"
        assert row["local"] == 0 and row["stack"] == 0, f"keeps values in memory: {what}"
        assert row["threads"], f"has no __launch_bounds__: {what}"
        assert row["shared"] <= (BESIDE_DYNAMIC if row["kernel"] in dynamic_kernels() else 48 << 10), what
        for limit in [LIMITS[name] for name in LIMITS if re.match(name, row["instance"])] or [COMMON]:
            assert hardware_cuda.resident(row) >= limit.resident, f"{limit}: {what}"
            assert all(row[key] >= count for key, count in limit.at_least.items()), f"{limit}: {what}"


def test_every_limit_is_of_a_kernel(compiled):
    if any(isinstance(rows, CompileError) for rows in compiled.values()):
        pytest.skip("some files do not compile: see the tests above")
    there = {row["instance"] for rows in compiled.values() for row in rows}
    assert [name for name in LIMITS if not any(re.match(name, instance) for instance in there)] == []


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float *x) {
    float v[64];
    for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) x[(i + 1) * 1024 + threadIdx.x] = v[i] * v[63 - i];
}
"""
INDEXES = """
extern "C" __global__ void indexes(float *x, int at) {
    float v[64];
    for (int i = 0; i < 64; ++i) v[i] = x[i];
    v[at] = v[at + 1];
    x[65] = v[at + 2];
}
"""


def test_what_the_limits_are_there_for(tmp_path):
    """A spill ends the compilation; an array indexed at run time, and missing bounds, show in the rows."""
    files = [tmp_path / "spills.cu", tmp_path / "indexes.cu"]
    for file, text in zip(files, (SPILLS, INDEXES), strict=True):
        file.write_text(text)
    found = hardware_cuda.compiled(files)
    assert isinstance(found[files[0]], CompileError)
    assert "spilled to local memory in function 'spills'" in str(found[files[0]])
    rows = found[files[1]]
    assert [row["arch"] for row in rows] == list(_native_gpu.SHIPPED)
    assert all(row["instance"] == "indexes" and row["threads"] is None for row in rows)
    assert [row["local"] > 0 for row in rows if row["arch"] == "sm_90"] == [True]
