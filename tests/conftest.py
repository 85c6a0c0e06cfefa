"""What every test runs under: a cache apart, C++ warnings as errors, few threads, no network; and a device.

FASTLORA_TEST_DEVICE    where tests/ops, tests/fused and tests/patching make their tensors; else the CPU
FASTLORA_TEST_SHARD     "2/8": the third of eight parts of the tests, for processes that share the work
FASTLORA_TEST_DEADLINE  seconds since the epoch from which no further test begins
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

# Entries are named after what made them, so sessions share them: kernels are compiled when they changed.
os.environ["FASTLORA_CACHE"] = str(Path(__file__).parents[1] / "build" / "test-cache")
os.environ.setdefault("FASTLORA_CXXFLAGS", "-Werror")
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from accuracy import DEVICE

ON_THE_DEVICE = ("ops", "fused", "patching")
BLOCKS = 8  # per shard: neighbours share compiled kernels, and no shard has all of the slow tests


@pytest.fixture(autouse=True)
def _tensors_on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that a test makes without naming a device are made on `DEVICE`."""
    wanted = request.path.parent.name in ON_THE_DEVICE and not request.node.get_closest_marker("own_device")
    if not wanted or "FASTLORA_TEST_DEVICE" not in os.environ:
        yield
        return
    torch.set_float32_matmul_precision("highest")  # TF32 would be what float32 tests measure
    with DEVICE:
        yield


@pytest.fixture(autouse=True)
def _new_memory_holds_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: what a kernel leaves unwritten shows, in every run."""
    if request.path.parent.name not in ("ops", "fused"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("FASTLORA_TEST_DEADLINE", "inf")):
        pytest.skip("no time was left")


@pytest.hookimpl(trylast=True)  # after -k: shards are parts of what it left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("cpu_only")
        if marker and DEVICE.type != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {marker.args[0]}"))
    shard, shards = map(int, os.environ.get("FASTLORA_TEST_SHARD", "0/1").split("/"))
    blocks = min(BLOCKS * shards, len(items))
    kept, left = [], []
    for at, item in enumerate(items):
        (kept if at * blocks // len(items) % shards == shard else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End where a failed kernel took the GPU's context along: nothing after it could run."""
    if report.failed and DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{report.nodeid} left the GPU unusable: {str(error).splitlines()[0]}", returncode=3)
