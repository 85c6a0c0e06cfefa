"""csrc/tests/gpu_emulator.h ends the program at a launch that a GPU would refuse, and takes the others."""

from __future__ import annotations

import subprocess

import pytest

from pyfastlora import _jit

LAUNCH = """
#include "gpu.h"
namespace fastlora::gpu {
__global__ void fill(float* out) {
    FASTLORA_SHARED(shared);
    shared[0] = 1;
    *out += shared[0];
}
}
int main(int, char** sizes) {
    using namespace fastlora::gpu;
    const auto size = [&](int i) { return (unsigned)std::atoi(sizes[i]); };
    float sum = 0;
    const dim3 grid(size(1), size(2), size(3)), block(size(4));
    return launch(fill, grid, block, size(5), nullptr, &sum) || sum != (float)grid.y * block.x;
}
"""


@pytest.fixture(scope="module", params=["", "-DFASTLORA_EMULATE_PLAIN"], ids=["sm_80", "plain"])
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "launch.cpp").write_text(LAUNCH)
    compiler = _jit.find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    options = ["-std=c++17", "-DFASTLORA_EMULATE_GPU", "-Wno-unknown-pragmas", f"-I{_jit.csrc()}"]
    command = [*compiler.command, *options, *request.param.split(), "launch.cpp", "-o", "launch"]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "launch", (64 if request.param else 99) << 10


def test_launches(program):
    path, most = program
    for sizes, said in (
        ((1, 2, 1, 32, most), ""),
        ((1, 3, 1, 1024, 1), ""),
        ((1, 1, 1, 32, most + 1), f"{most + 1} bytes, at most {most}"),
        ((1, 1, 1, 1025, 1), "more than 1024 threads"),
        ((1, 65536, 1, 32, 1), "more blocks than a grid may have: grid (1, 65536, 1)"),
        ((1, 1, 65536, 32, 1), "more blocks than a grid may have"),
        ((0, 1, 1, 32, 1), "an empty grid or block"),
    ):
        done = subprocess.run([path, *map(str, sizes)], capture_output=True, text=True)
        assert (done.returncode == 0) == (said == "") and said in done.stderr, (sizes, done)
