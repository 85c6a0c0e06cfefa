"""PEFT's own tests, with every model patched: `make test-peft`, or `python -m tests.peft_suite`.

The tests come with PEFT's source distribution, of the version that is installed. What passes without us has
to pass with us: whatever fails is run again without us, from the same random numbers, and is ours unless it
fails then too. So that it cannot pass by running PEFT's own forward, or nothing, there are floors for the
tests that pass and for the fused calls of every sort.

`--list` names what fails without us, and the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.peft_suite import hub

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "peft-suite"

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_mixed",
    "test_other",
    "test_lora_conversion",
    "test_lora_intruders",
    "test_xlora",
    "test_mapping",
    "test_integrations",
    "test_lora_variants",
    "test_initialization",
    "test_tuners_utils",
    "test_low_level_api",
    "test_target_parameters",
    "test_trainable_tokens",
    "test_loraplus",
    "test_lorafa",
    "test_lora_ga",
    "test_bdlora",
    "test_arrow",
    "test_velora",
    "test_helpers",
)
#: Nine tenths of what PEFT 0.21.2 gave: the tests that pass, those that run something fused, and what.
FLOORS = {"passed": 4512, "tests": 851, "linears": 9485, "groups": 4483, "blocks": 93, "embeddings": 170}
# These ask for more than rounding leaves alike: docs/fallbacks.md tells of each.
ROUNDED = re.compile(
    r"test_lora_use_dora_linear$|::TestScalingAdapters::|test_disable_adapter\[.*Llama4|"
    r"test_save_load_roundtrip_fsdp_wrapped\w*\[.*LoRA with lora_b bias"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="name what fails without us, and why")
    options = parser.parse_args()
    sources, shards = unpacked(), min(4, os.cpu_count() or 1)
    hub.fill(WORK / "hub")
    results = run(sources, "patched", shards)
    failed = sorted(name for name, outcome in results["outcomes"].items() if outcome == "failed")
    plain = run(sources, "plain", shards, only=failed)
    excused = [name for name in failed if plain["outcomes"].get(name) == "failed"]
    passed = sum(outcome == "passed" for outcome in results["outcomes"].values())
    print(f"{passed} of PEFT's tests passed, {len(excused)} failed that fail without us")
    for name in excused if options.list else ():
        print(f"fails without us too: {name}: {plain['reasons'][name]}")
    calls = results["calls"]
    sorts = ", ".join(f"{number} {sort}" for sort, number in calls.items() if sort != "tests")
    print(f"ran fused: {sorts}, in {calls['tests']} tests")
    ours = [name for name in failed if name not in excused and not ROUNDED.search(name)]
    for name in ours:
        print(f"fails with us only: {name}: {results['reasons'][name]}")
    found = {"passed": passed, **calls}
    low = [what for what in FLOORS if found[what] < FLOORS[what]]
    for what in low:
        print(f"{what}: {found[what]}, at least {FLOORS[what]} expected")
    return 1 if ours or low else 0


def unpacked() -> Path:
    """The directory with the tests of the PEFT that is installed."""
    version = importlib.metadata.version("peft")
    home = WORK / f"peft-{version}"
    if not (home / "tests" / "__init__.py").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-binary", "peft", "--no-build-isolation", "--dest", str(WORK), f"peft=={version}"]
        subprocess.run(pip, check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as archive:
            tests = [member for member in archive if member.name.startswith(f"peft-{version}/tests/")]
            archive.extractall(WORK, members=tests, filter="data")
        (home / "tests" / "__init__.py").touch()  # not in the archive; the files import one another
    return home


def run(sources: Path, how: str, shards: int, only: list[str] | None = None) -> dict[str, Any]:
    """Run the tests, or only some, in as many processes; their results together."""
    together: dict[str, Any] = {"outcomes": {}, "reasons": {}, "calls": Counter()}
    if only == []:
        return together
    environment = {
        **os.environ,
        "FASTLORA_PEFT_SUITE": how,
        "HF_HUB_CACHE": str(WORK / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
    }
    if only is not None:
        environment["FASTLORA_PEFT_SUITE_ONLY"] = str(WORK / "only.json")
        (WORK / "only.json").write_text(json.dumps(only))
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(sources)]
    files = [f"tests/{name}.py" for name in FILES]
    if only is not None:
        files = [file for file in files if any(name.startswith(file) for name in only)]
    command += ["-p", "plugin", *files]
    processes = []
    for shard in range(shards):
        results, log = WORK / f"results-{shard}.json", WORK / f"log-{shard}.txt"
        results.unlink(missing_ok=True)
        own = {"FASTLORA_PEFT_SUITE_SHARD": f"{shard}/{shards}", "FASTLORA_PEFT_SUITE_RESULTS": str(results)}
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=sources, env=environment | own, stdout=out, stderr=out)
        processes.append((process, results, log))
    for process, results, log in processes:
        if process.wait() not in (0, 1, 5):  # passed, tests failed, or no test was in this part
            sys.exit(f"{log.read_text()[-4000:]}\npytest ended with {process.returncode}: see {log}")
        found = json.loads(results.read_text())
        together["outcomes"] |= found["outcomes"]
        together["reasons"] |= found["reasons"]
        together["calls"].update(found["calls"])
    return together


if __name__ == "__main__":
    sys.exit(main())
