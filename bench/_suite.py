"""The tests and compute-sanitizer as steps of `bench.gpu`, and what their reports say."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench._environment import ROOT, cores
from bench._stream import Row, ending, plain, run_child

ON_THE_DEVICE = ("tests/ops", "tests/fused", "tests/patching")
# What needs no device, or looks for one itself.
THE_REST = (
    "tests/test_gpu_library.py",
    "tests/test_gpu_toolkit.py",
    "tests/trainer",
    "tests/test_gpu_compile.py",
)
REHEARSED = ("tests/ops/test_glu.py", "-k", "silu and float32")
TOOLS = ("memcheck", "racecheck")
FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
SHARDS = 16  # processes: a test on a GPU waits for Python and for Triton's compiler, not for the GPU
SHOWN = 40  # failures with their texts


@dataclass(slots=True)
class Summary:
    """Of some JUnit reports."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped"

    def row(self) -> Row:
        """JSON-ready."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "skipped": dict(self.skipped.most_common()),
            "failures": self.failures[:SHOWN],
        }


def summarise(reports: Sequence[Path]) -> Summary:
    """Of JUnit XML files as pytest writes them. One that is missing or torn counts as a failure."""
    found = Summary()
    for report in reports:
        try:
            cases = ElementTree.parse(report).getroot().iter("testcase")
        except (OSError, ElementTree.ParseError) as error:
            found.failed += 1
            found.failures.append({"test": report.stem, "said": f"no report: {type(error).__name__}"})
            continue
        for case in cases:
            _count(case, found)
    return found


def _count(case: ElementTree.Element, found: Summary) -> None:
    skipped = case.find("skipped")
    trouble = case.find("failure") if case.find("failure") is not None else case.find("error")
    if trouble is not None:
        found.failed += 1
        test = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("tests.")
        found.failures.append({"test": test, "said": _short(trouble)})
    elif skipped is not None:
        found.skipped[_reason(skipped.get("message", ""))] += 1
    else:
        found.passed += 1


def _short(trouble: ElementTree.Element) -> str:
    """What pytest marked with E, its first lines."""
    marked = [line[1:].strip() for line in (trouble.text or "").splitlines() if line.startswith("E ")]
    return plain(" ".join(marked) or trouble.get("message", ""))[:300]


def _reason(message: str) -> str:
    """In one line."""
    return plain(re.sub(r"\s+", " ", message).removeprefix("Skipped: "))[:120]


# ---- the steps --------------------------------------------------------------------------------------------


def run_tests(folder: Path, env: Mapping[str, str], device: str, until: float, rehearse: bool) -> Summary:
    """The tests on the device, in processes side by side, each with a part of them."""
    shards = 2 if rehearse else max(1, min(SHARDS, cores()))
    chosen = REHEARSED if rehearse else ON_THE_DEVICE
    reports = [folder / f"tests-{shard}.xml" for shard in range(shards)]

    def run(shard: int) -> int | None:
        own = {
            "FASTLORA_TEST_DEVICE": device,
            "FASTLORA_TEST_SHARD": f"{shard}/{shards}",
            "FASTLORA_TEST_DEADLINE": str(until),
            "OMP_NUM_THREADS": str(max(1, cores() // shards)),
        }
        command = pytest_command(chosen, reports[shard])
        return run_child(command, {**env, **own}, folder / f"tests-{shard}.log", until)

    with ThreadPoolExecutor(shards) as pool:
        codes = list(pool.map(run, range(shards)))
    found = summarise(reports)
    for shard, code in enumerate(codes):
        if code not in (0, 1):  # pytest: all passed, some failed
            part = f"part {shard} of {shards} ended with {code}"
            found.failed += 1
            found.failures.insert(0, {"test": part, "said": ending(code, folder / f"tests-{shard}.log")})
    return found


def run_the_rest(folder: Path, env: Mapping[str, str], until: float, rehearse: bool) -> Summary | None:
    """The tests that are not about a device, in one process. None: the time was up before they were done."""
    if until <= time.time():
        return None
    report, log = folder / "rest.xml", folder / "rest.log"
    own = {"FASTLORA_TEST_DEADLINE": str(until), "OMP_NUM_THREADS": str(cores())}
    code = run_child(pytest_command(REHEARSED if rehearse else THE_REST, report), {**env, **own}, log, until)
    if code is None:
        return None
    found = summarise([report])
    if code not in (0, 1):
        found.failed += 1
        found.failures.insert(0, {"test": "the rest", "said": ending(code, log)})
    return found


def pytest_command(chosen: Sequence[str], report: Path) -> list[str]:
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *chosen, *options]


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or beside nvcc."""
    beside = [
        str(Path(nvcc).resolve().parent)
        for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
        if nvcc
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *beside]))


def run_sanitizer(sanitizer: str, folder: Path, env: Mapping[str, str], until: float) -> dict[str, Row]:
    """By tool: `findings` in the tests of the compiled kernels, a part of each file's.

    `refused` where the tool cannot watch this GPU.
    """
    own = {
        "FASTLORA_TEST_DEVICE": "cuda",
        "FASTLORA_TEST_SHARD": "0/24",
        "FASTLORA_TEST_DEADLINE": str(until),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # an access past a tensor is one past an allocation
    }

    def run(tool: str) -> Row:
        log, report = folder / f"{tool}.log", folder / f"{tool}.xml"
        command = [sanitizer, "--tool", tool, "--print-limit", "20"]
        command += pytest_command(("tests/ops", "-k", "gpu"), report)
        begin = time.time()
        code = run_child(command, {**env, **own}, log, until)
        said = log.read_text(errors="replace")
        row: Row = {**summarise([report]).row(), "seconds": round(time.time() - begin, 1)}
        if "Device not supported" in said:
            return {**row, "refused": "Device not supported"}
        findings = FOUND.findall(said)
        return {**row, "findings": int(findings[-1]) if findings else None, "said": ending(code, log)}

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(run, TOOLS), strict=True))


def environment_for(cache: Path) -> dict[str, str]:
    """Of every child: tests and benchmarks use one build, the tests' own."""
    return {
        **os.environ,
        "FASTLORA_CACHE": str(cache),
        "FASTLORA_CXXFLAGS": "-Werror",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
