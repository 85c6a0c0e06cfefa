"""Which ops the tests hold to their oracles where there is no GPU, read off the tests themselves.

    python tests/covered.py        JSON, by ways: {"emulated": ["dequant_4bit", ..], "plain": ..}

Each way is a choice of tests that another test runs, under a plugin that has the kernels take CPU tensors.
Here they are collected, not run: a test that takes the name of an implementation has it from
`accuracy.implementations(op)`, which tells the op. This file is the plugin that asks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accuracy import NameOf

HERE = Path(__file__).parent

# What multiplies, or copies ahead, has another way on chips without bfloat16 tensor cores. A product is 32
# shuffles of a warp there, so shapes that take seconds in the emulator are left out.
PLAIN = (
    "gpu and (bfloat16 and float32 or float16-float16) and (shrink and (13-300 or 3-19)"
    " or test_expand and 3-19 and plain or test_grad and 13-300 or test_both_gradients and 3-19"
    " or straight_from_4_bits and 33 or test_dense and 37-129)"
    " or gpu and (13-forward and 48 and bfloat16 or 70-513-17-520-float32-bfloat16-bfloat16)"
)
# Left out, as a program costs 1.4 ms: middling shapes, pairs of 16-bit dtypes, torch's GEMM.
NOT_INTERPRETED = ("float16-bfloat16", "bfloat16-float16", "3-19-2", "33-70-64", "8-256-16")
NOT_INTERPRETED += tuple(f"{rows}-{product}" for rows in (3, 5, 70) for product in ("forward", "input_grad"))
NOT_INTERPRETED += ("test_registry",)

# Left out, as a weight takes a second to decode: products that are a dense copy and torch's GEMM.
NOT_EMULATED = ("33-forward", "70-forward", "(dense_product and input_grad)")

# way: (plugin, -k, environment)
WAYS: dict[str, tuple[str, str, dict[str, str]]] = {
    "emulated": ("emulated_gpu", " and not ".join(("gpu", *NOT_EMULATED)), {}),
    "plain": ("emulated_gpu", PLAIN, {"FASTLORA_EMULATE": "plain"}),
    "interpreted": ("interpreted_triton", " and not ".join(("triton", *NOT_INTERPRETED)), {}),
    "cpu": ("accuracy", "cpu", {}),  # as they are
}


def arguments_of(way: str) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment) of the pytest that runs the tests of a way."""
    plugin, select, env = WAYS[way]
    paths = os.pathsep.join(map(str, (HERE.parent, HERE, HERE / "ops")))
    arguments = ["-p", plugin, "-p", "no:cacheprovider", "-q", "-k", select, str(HERE / "ops")]
    return arguments, {**os.environ, "PYTHONPATH": paths, "FASTLORA_TEST_SHARD": "0/1", **env}


def ops_of(way: str) -> list[str]:
    """The ops that the way's tests are about."""
    arguments, env = arguments_of(way)
    command = [sys.executable, "-m", "pytest", "-p", "covered", "--collect-only", *arguments]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of the items that -k left, whose implementations are those that -k names."""
    wanted = session.config.getoption("keyword").partition(" ")[0]
    calls = [item.callspec for item in session.items if hasattr(item, "callspec")]
    names = [value for call in calls for value in call.params.values() if isinstance(value, NameOf)]
    session.config.stash[FOUND] = sorted({op for name in names if name == wanted for op in name.ops})


FOUND = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    print(json.dumps(config.stash.get(FOUND, [])))


if __name__ == "__main__":
    print(json.dumps({way: ops_of(way) for way in WAYS}))
