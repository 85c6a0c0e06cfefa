"""What bench.gpu makes of reports and results: sums of JUnit files, a page, its plots, the README's lines."""

import os
import sys
import time
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import _suite, report  # noqa: E402
from bench._results import Results  # noqa: E402
from bench._sections import page, readme_block  # noqa: E402

# ---- reports ----------------------------------------------------------------------------------------------

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.ops.test_glu" name="test_a[gpu]" />
<testcase classname="tests.ops.test_glu" name="test_b[gpu]"><failure message="AssertionError: short">
    def test_b():
&gt;       assert error &lt; 1
E       AssertionError: y: error 0.3, theirs 0.1
E       assert 0.3 &lt;= 0.1

tests/ops/test_glu.py:33: AssertionError</failure></testcase>
<testcase classname="tests.ops.test_glu" name="test_c"><error message="failed on setup: boom" /></testcase>
<testcase classname="a" name="test_d"><skipped message="CPU only: panels">x</skipped></testcase>
<testcase classname="a" name="test_e"><skipped message="CPU only: panels">y</skipped></testcase>
</testsuite></testsuites>"""


def test_junit_reports_are_summed_up(tmp_path):
    (tmp_path / "a.xml").write_text(JUNIT)
    (tmp_path / "torn.xml").write_text(JUNIT[:300])
    found = _suite.summarise([tmp_path / "a.xml", tmp_path / "torn.xml", tmp_path / "missing.xml"])
    assert (found.passed, found.failed, dict(found.skipped)) == (1, 4, {"CPU only: panels": 2})
    assert found.failures == [
        {
            "test": "ops.test_glu::test_b[gpu]",
            "said": "AssertionError: y: error 0.3, theirs 0.1 assert 0.3 <= 0.1",
        },
        {"test": "ops.test_glu::test_c", "said": "failed on setup: boom"},
        {"test": "torn", "said": "no report: ParseError"},
        {"test": "missing", "said": "no report: FileNotFoundError"},
    ]
    assert found.text == "1 passed, 4 failed, 2 skipped"


def test_a_sanitizers_findings_are_counted(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "name = sys.argv[sys.argv.index('--tool') + 1]\n"
        "report = next(a for a in sys.argv if a.startswith('--junitxml=')).partition('=')[2]\n"
        "open(report, 'w').write('<testsuites><testcase classname=\"a\" name=\"b\"/></testsuites>')\n"
        "said = {'memcheck': 'ERROR SUMMARY: 0 errors', 'racecheck': 'RACECHECK SUMMARY: 3 hazards'}\n"
        "print('========= ' + said[name])\n"
    )
    tool.chmod(0o755)
    found = _suite.run_sanitizer(str(tool), tmp_path, {}, time.time() + 30)
    assert {name: (row["findings"], row["passed"]) for name, row in found.items()} == {
        "memcheck": (0, 1),
        "racecheck": (3, 1),
    }


def test_the_rest_is_dropped_when_the_time_is_up(tmp_path):
    assert _suite.run_the_rest(tmp_path, dict(os.environ), time.time() - 1, rehearse=True) is None


# ---- the page ---------------------------------------------------------------------------------------------


def figure(median, noisy=False):
    return {"median": median, "min": median, "q1": median, "q3": median, "noisy": noisy}


def layer(storage="bf16", feature="LoRA", tokens=8192, level="linears", difference=0.01, fallback="", **ms):
    ms = {"base": 10.0, "PEFT fp32+ac": 15.0, "ours fp32+ac": 11.5, "PEFT bf16": 13.0, "ours bf16": 14.0} | ms
    return {
        "step": "layers",
        "level": level,
        "model": "8B",
        "storage": storage,
        "feature": feature,
        "tokens": tokens,
        "rank": 16,
        "ms": {name: figure(value) for name, value in ms.items()},
        "wall_ms": {name: figure(2 * value) for name, value in ms.items()},
        "tax": {name: figure(value / 10) for name, value in ms.items() if name != "base"},
        "wall_tax": {name: figure(value / 10) for name, value in ms.items() if name != "base"},
        "rounds": 9,
        "saved_bytes": {name: int(value * 1e8) for name, value in ms.items()},
        "peak_bytes": {name: int(value * 2e8) for name, value in ms.items()},
        "difference": {"fp32+ac": difference},
        "fallback": fallback,
        "left_out": {"PEFT": "bitsandbytes is not installed"} if storage == "NF4" else {},
    }


def results(*rows):
    environment = {
        "date": "2026-11-21 04:00 UTC",
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "peft": "0.21.2",
        "commit": "abc",
    }
    return Results("gpu", environment, {"minutes": 9.0, "rehearsal": False}, list(rows))


def line_with(text, *starts):
    (line,) = [line for line in text.splitlines() if " ".join(line.split()).startswith(starts)]
    return " ".join(line.split())


def test_measured_stands_beside_predicted_and_marks_say_what_is_wrong():
    rows = [
        layer(),
        layer(tokens=512, difference=0.3, fallback="a hook"),
        layer(storage="NF4"),
        layer(level="block"),
    ]
    text = page({"gpu": results(*rows)}, {"gpu": ["gpu_tax.png"]})
    linears = text.partition("### The same with")[0]
    assert line_with(linears, "| bf16 LoRA | 8192").startswith(
        "| bf16 LoRA | 8192 | 10.000 | 1.50 / 1.55 | 1.15 / 1.16 | 1.30 / 1.32 | 1.40 / 1.16 ▼ | 1.05 |"
    )
    assert line_with(linears, "| bf16 LoRA*! | 512").startswith(
        "| bf16 LoRA*! | 512 | 10.000 | 1.50 / 1.83 |"
    )
    assert line_with(linears, "| NF4 LoRA | 8192").startswith(
        "| NF4 LoRA | 8192 | 10.000 | 1.50 / 1.43 | 1.15 / 1.19 |"
    )
    assert line_with(text, "| tax, GPU time, 8B bf16 LoRA").endswith("| 1.06 | 1.15 | 1.40 |")
    assert line_with(text, "| PEFT over ours, wall time").endswith("| 1.60 | 1.30 | 0.93 |")
    assert line_with(text, "| saved bytes of a block").endswith("| 0.55 | 0.77 | 1.08 |")
    assert line_with(text, "| 8B block, bf16 LoRA").endswith(
        "| 1000 / 2000 | 1500 / 3000 | 1150 / 2300 | 1300 / 2600 | 1400 / 2800 |"
    )
    assert "- linears, NF4: PEFT: bitsandbytes is not installed" in text and "- * a hook" in text
    assert "![Adapter tax, measured and predicted](gpu_tax.png)" in text


def test_ops_are_judged_by_bandwidth_or_by_launches():
    def op(case, nbytes, **times):
        for variant, us in times.items():
            yield {
                "step": "ops",
                "op": "glu_forward",
                "case": case,
                "dtype": "bf16",
                "threads": 1,
                "variant": variant,
                "role": "ours" if variant == "gpu" else "other",
                "bytes": nbytes,
                "ms": figure(us / 1e3),
                "wall_ms": figure(us / 500),
                "percent_of_copy": 93.0,
                "copy_gb_s": 4300.0,
                "ratio": {},
            }

    launch = {
        "step": "machine",
        "question": "empty launch",
        "case": "alone",
        "value": 2.5,
        "unit": "us",
        "assumed": 3.5,
    }
    failed = {"step": "ops", "case": "test_glu[x]", "failed": "RuntimeError: no"}
    rows = [
        launch,
        *op("512x4096", 4_000_000, gpu=5, torch=9),
        *op("8192x14336", 704_643_072, gpu=180, torch=400),
        failed,
    ]
    text = page({"gpu": results(*rows)}, {})
    assert line_with(text, "| 512x4096") == "| 512x4096 | bf16 | 4.0 | 3.5 | 5.0 | 9.0 | 10.0 |"
    assert (
        line_with(text, "| 8192x14336")
        == "| 8192x14336 | bf16 | 704.6 | 184.1 | 180.0 (93 %) | 400.0 (93 %) | 360.0 |"
    )
    assert "empty launch, 2.5 us here" in text and "- ops: test_glu[x]: RuntimeError: no" in text
    assert line_with(text, "| empty launch").endswith("| alone | 2.5 us | 3.5 |")


def test_the_page_says_what_failed():
    rows = [
        {
            "step": "tests",
            "passed": 7,
            "failed": 1,
            "skipped": {"CPU only: a | b": 3},
            "failures": [{"test": "t", "said": "x | y"}],
        },
        {"step": "sanitizer", "tool": "memcheck", "findings": 2, "passed": 5, "failed": 0},
        {"step": "tests", "outcome": "failed", "said": "7 passed, 1 failed", "seconds": 61.0},
    ]
    text = page({"gpu": results(*rows)}, {})
    assert "7 passed, 1 failed, 3 skipped." in text
    assert line_with(text, "| t |") == "| t | x / y |"
    assert line_with(text, "| CPU only") == "| CPU only: a / b | 3 |"
    assert line_with(text, "| memcheck") == "| memcheck | 2 | 5 | 0 |"
    assert line_with(text, "| tests | failed") == "| tests | failed | 7 passed, 1 failed | 61 |"


def test_a_gpu_stands_in_the_readme_and_has_its_plots(tmp_path):
    found = results(layer(), layer(feature="DoRA"), layer(storage="NF4", tokens=512))
    found.write(tmp_path / "nvidia-h200" / "gpu.json")
    block = readme_block({"nvidia-h200/README.md": {"gpu": found}})
    assert "[NVIDIA H200](nvidia-h200/README.md), torch 2.11.0" in block
    both = "1.50 → 1.15 | 1.30 → 1.40 ▼"  # GPU time, wall time
    assert line_with(block, "| bf16 LoRA, T = 8192") == f"| bf16 LoRA, T = 8192 | {both} | {both} |"
    done = CliRunner().invoke(report.main, [str(tmp_path / "nvidia-h200" / "gpu.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "nvidia-h200" / "gpu_tax.png").read_bytes().startswith(b"\x89PNG")
    assert "## Adapter tax" in (tmp_path / "nvidia-h200" / "README.md").read_text()
