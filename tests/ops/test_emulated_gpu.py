"""The kernels of csrc/cuda without a GPU: every test of an op that names the implementation "gpu", with the
kernels run by csrc/tests/gpu_emulator.h in a process of its own."""

import os
import subprocess
import sys

import covered
import pytest

pytestmark = pytest.mark.cpu_only("the emulator; on a GPU the same tests run there")


def run_ops_tests(way: str, *options: str, **env: str) -> str:
    """pytest's summary line of the op tests of a way, run in the emulator."""
    arguments, environment = covered.arguments_of(way)
    command = [sys.executable, "-m", "pytest", *arguments, f"--ignore={__file__}", *options]
    done = subprocess.run(command, env=environment | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_numerics():
    assert "passed" in run_ops_tests("emulated")


def test_the_ways_of_plain_chips():
    assert "passed" in run_ops_tests("plain")


def test_memory_and_undefined_behaviour():
    """Under AddressSanitizer and UBSan every access outside a tensor or a shared array ends the program.

    Ten times as slow: so float32 alone, small shapes, and of bfloat16 the product straight from the codes.
    """
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, found)):
        pytest.skip("g++ has no sanitizer libraries here")
    flags = "-Werror -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    asan = "detect_leaks=0:detect_odr_violation=0"
    instrumented = {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": asan, "FASTLORA_CXXFLAGS": flags}
    select = "float32 and not float16 and not bfloat16 or added and bfloat16 and 3-"
    select = f"gpu and ({select}) and not dense_product and not 2112 and not 513"
    run_ops_tests("emulated", "-k", select, **instrumented)
