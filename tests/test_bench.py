"""The benchmarks as programs: the runner's arithmetic, and that every figure reaches the JSON and the page.

Nothing here asks how fast anything is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the checkout, not of the installed package

from bench import adapter_tax, basics, ops, report  # noqa: E402
from bench._environment import cpu_model, slug  # noqa: E402
from bench._results import Results  # noqa: E402
from bench._sections import page, readme_block  # noqa: E402
from bench._subjects import CONFIGS, FEATURES, TINY  # noqa: E402
from bench._timing import Rounds, Spread, interleave  # noqa: E402


class Clock:
    """Time that passes only when something says so."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        """A callable that takes these seconds, call by call, then the last ones again."""
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# ---- the runner -------------------------------------------------------------------------------------------


def test_callables_take_turns():
    clock = Clock()
    done = interleave({"a": clock.takes("a", 1), "b": clock.takes("b", 2)}, rounds=3, warmup=1, clock=clock)
    assert clock.order == ["a", "b"] * 4
    assert done.seconds == {"a": [1, 1, 1], "b": [2, 2, 2]}


def test_warm_up_is_not_counted():
    clock = Clock()
    done = interleave({"a": clock.takes("a", 50, 40, 1)}, rounds=2, warmup=2, clock=clock)
    assert done.seconds == {"a": [1, 1]}


def test_ratios_are_taken_within_a_round():
    clock = Clock()
    # The machine gets slower with every round; b always takes three times as long as a.
    runs = {"a": clock.takes("a", 1, 1, 2, 8), "b": clock.takes("b", 3, 3, 6, 24)}
    ratio = interleave(runs, rounds=3, warmup=1, clock=clock).ratio("b", "a")
    assert (ratio.median, ratio.minimum, ratio.q1, ratio.q3, ratio.count) == (3, 3, 3, 3, 3)
    assert not ratio.noisy


def test_the_median_ratio_is_not_the_ratio_of_the_medians():
    rounds = Rounds({"a": [1.0, 10.0, 4.0], "b": [2.0, 10.0, 12.0]})
    assert rounds.ratio("b", "a").median == 2.0
    assert rounds.time("b").median / rounds.time("a").median == 2.5


def test_the_budget_ends_the_rounds_but_not_before_the_least():
    def rounds_done(seconds, at_least):
        clock = Clock()
        runs = {"a": clock.takes("a", 1)}
        return len(interleave(runs, rounds=10, at_least=at_least, seconds=seconds, warmup=1, clock=clock))

    assert rounds_done(seconds=5, at_least=2) == 4  # and one of warm-up
    assert rounds_done(seconds=0, at_least=3) == 3
    assert rounds_done(seconds=100, at_least=3) == 10


@pytest.mark.parametrize("runs, rounds", [({}, 1), ({"a": print}, 0)])
def test_nothing_to_run_is_refused(runs, rounds):
    with pytest.raises(ValueError, match="needs callables and at least one round"):
        interleave(runs, rounds=rounds)


def test_quartiles_and_noise():
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (spread.median, spread.minimum, spread.q1, spread.q3) == (3, 1, 2, 4)
    assert spread.noisy
    assert not Spread.of([100.0, 101.0, 99.0]).noisy
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 1)
    assert spread.to_dict(1e3) == {"median": 3000, "min": 1000, "q1": 2000, "q3": 4000, "noisy": True}


# ---- where a figure comes from ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, cores, folder",
    [
        ("AMD EPYC 9R45 96-Core Processor", 2, "amd-epyc-9r45-avx512-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", 1, "intel-xeon-platinum-8488c-avx512-1-core"),
        ("", 4, "aarch64-avx512-4-cores"),
    ],
)
def test_folders_are_named_after_the_machine(name, cores, folder):
    found = {"cpu": name, "cores": cores, "architecture": "aarch64", "kernels": "avx512"}
    assert slug(found) == folder
    assert slug(found | {"kernels": "not built: no compiler"}) == folder.replace("-avx512", "")


def test_the_cpu_has_a_name_without_proc(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    assert cpu_model(str(tmp_path / "cpuinfo")) == "Some CPU"
    assert cpu_model(str(tmp_path / "missing"))


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 1, "kind": "weather"}')
    with pytest.raises(ValueError, match=r"a\.json: needs schema 1 and a kind of adapter_tax, ops"):
        Results.read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json: not JSON"):
        Results.read(tmp_path / "b.json")


# ---- adapter_tax ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Every adapter and dtype on a tiny layer and a tiny model, two rounds each."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path_factory.mktemp("machine") / "adapter_tax.json"
    done = CliRunner().invoke(
        adapter_tax.main, ["--tiny", "--rounds", "2", "--tokens", "16", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    return out, done.output


def test_every_case_is_measured(tiny_run):
    out, printed = tiny_run
    found = Results.read(out)
    wanted = {(level, f, c) for level in ("layer", "model") for f in FEATURES for c in CONFIGS}
    assert {(row["level"], row["feature"], row["config"]) for row in found.rows} == wanted
    assert len(found.rows) == len(wanted)
    for row in found.rows:
        assert row["rounds"] == 2
        assert row["tokens"] == (16 if row["level"] == "layer" else TINY.batch * TINY.length)
        assert set(row["ms"]) == {"base", "PEFT", "ours"} and set(row["tax"]) == {"PEFT", "ours"}
        assert all(figure["min"] > 0 for figure in row["ms"].values())
    assert {"cpu", "kernels", "torch", "peft", "commit", "date", "load", "copy_gb_s"} <= set(
        found.environment
    )
    assert found.settings["rounds"] == 2 and found.settings["width"] == TINY.width
    assert "our tax" in printed and "written to" in printed


def test_ours_is_what_is_measured(tiny_run):
    """A fallback would time PEFT against itself; another result would time something else."""
    rows = Results.read(tiny_run[0]).rows
    for row in rows:
        assert row["fallback"] == ""
        assert row["difference"] < (0.05 if row["config"].startswith("bf16") else 1e-4)
    assert any(row["difference"] for row in rows)  # the same code would give 0


def test_the_page_shows_every_case(tiny_run):
    folder = tiny_run[0].parent
    written = report.write(folder, report.gather([tiny_run[0]])[folder])
    assert [path.name for path in written] == ["README.md", "adapter_tax.png"]
    assert (folder / "adapter_tax.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    rows = Results.read(tiny_run[0]).rows
    table_lines = [line for line in text.splitlines() if line.startswith(tuple(f"| {f} " for f in FEATURES))]
    assert len(table_lines) == len(rows)
    for config in CONFIGS:
        assert text.count(f": {config}\n") == 2


def test_without_matplotlib_there_is_a_page_all_the_same(monkeypatch, tmp_path):
    taxes(1.5, 1.1).write(tmp_path / "adapter_tax.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.write(tmp_path, report.gather([tmp_path / "adapter_tax.json"])[tmp_path])
    assert written == [tmp_path / "README.md"]
    text = written[0].read_text()
    assert "1.50 |" in text and ".png" not in text and "The plots are left out: " in text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--only", "LoRa"], "'LoRa': choose from LoRA, dropout, DoRA, QLoRA, QDoRA"),
        (["--tokens", "12,x"], "'12,x': needs whole numbers from 1"),
        (["--layers-only", "--model-only"], "leave nothing to measure"),
    ],
)
def test_wrong_options_are_explained(arguments, sentence):
    done = CliRunner().invoke(adapter_tax.main, arguments)
    assert done.exit_code == 2 and sentence in " ".join(done.output.split())


def test_a_partial_run_leaves_the_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("bench._results.HOME", tmp_path)
    arguments = [
        "--tiny",
        "--rounds",
        "1",
        "--only",
        "LoRA",
        "--dtype",
        "fp32",
        "--tokens",
        "8",
        "--layers-only",
    ]
    done = CliRunner().invoke(adapter_tax.main, arguments)
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.iterdir())


# ---- the report -------------------------------------------------------------------------------------------


def figure(median, noisy=False):
    return {"median": median, "min": median, "q1": median, "q3": median, "noisy": noisy}


ENVIRONMENT = {
    "cpu": "Some CPU",
    "threads": 2,
    "kernels": "avx512",
    "torch": "2.13.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "date": "2026-11-21 04:00 UTC",
}


def taxes(peft, ours, feature="LoRA", fallback="", seconds=4.0):
    row = {
        "level": "layer",
        "feature": feature,
        "config": "bf16",
        "tokens": 512,
        "ms": {"base": figure(1.0), "PEFT": figure(peft, noisy=True), "ours": figure(ours)},
        "tax": {"PEFT": figure(peft), "ours": figure(ours)},
        "speedup": figure(peft / ours),
        "rounds": 17,
        "fallback": fallback,
    }
    settings = {"width": 2048, "rank": 16, "seconds": seconds, "at_least": 5}
    return Results("adapter_tax", ENVIRONMENT, settings, [row])


def op_row(op, case, variant, role, ms, threads=1, **ratio):
    row = {"op": op, "case": case, "dtype": "bf16", "threads": threads, "variant": variant, "role": role}
    ratios = {name: figure(value) for name, value in ratio.items()}
    return {**row, "ms": figure(ms), "percent_of_copy": 50.0, "ratio": ratios}


def line_with(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(line.split())


def test_losing_noisy_and_unfused_rows_are_marked():
    won = page({"adapter_tax": taxes(1.5, 1.1)}, {})
    assert line_with(won, "| LoRA ") == "| LoRA | 512 | 1.00 | 1.50~ | 1.10 | 1.50 | 1.10 | 1.36 |"
    lost = page({"adapter_tax": taxes(1.1, 1.25)}, {})
    assert line_with(lost, "| LoRA ") == "| LoRA | 512 | 1.00 | 1.10~ | 1.25 | 1.10 | 1.25 ▼ | 0.88 |"
    fallen = page({"adapter_tax": taxes(1.1, 1.1, fallback="a forward hook was added")}, {})
    assert line_with(fallen, "| LoRA*") and "* a forward hook was added" in fallen


def test_it_is_said_how_long_was_measured():
    for text in (
        page({"adapter_tax": taxes(1.5, 1.1, seconds=0.6)}, {}),
        readme_block({"page": {"adapter_tax": taxes(1.5, 1.1, seconds=0.6)}}),
    ):
        assert "Rounds: 17 for a layer; none began after 0.6 s of a case" in text
        assert "A shortened run: the default is 4 s." in text
    assert "shortened" not in page({"adapter_tax": taxes(1.5, 1.1)}, {})


def test_targets_stand_beside_what_was_reached_and_are_placed():
    text = page({"adapter_tax": taxes(2.9, 1.3, feature="DoRA")}, {})
    expected = "| layer, bf16, T = 512 | DoRA | 2.74 | 1.12 | 2.90 | 1.30 |"
    assert line_with(text, "| layer, bf16") == expected
    assert "set for two cores of an AMD EPYC (Zen 5)" in text and "measured on Some CPU, 2 threads" in text


def test_ops_by_variant():
    rows = [
        op_row("dequant_4bit", "4096x4096", "cpu", "ours", 1.5, memcpy=1.13),
        op_row("dequant_4bit", "4096x4096", "bitsandbytes", "other", 13.0, memcpy=9.9),
        op_row("dequant_4bit", "4096x4096", "memcpy", "floor", 1.3, memcpy=1.0),
        op_row("dora_norm", "4096x4096 nf4 r=16", "cpu", "ours", 8.2),
        op_row("dora_norm", "4096x4096 nf4 r=16", "PEFT", "other", 7.0),
    ]
    text = page({"ops": Results("ops", ENVIRONMENT, {}, rows)}, {})
    shown = line_with(text, "| 4096x4096 | bf16")
    assert shown == "| 4096x4096 | bf16 | 1 | 1.500 (50 %) | 13.000 (50 %) | 1.300 (50 %) |"
    assert "8.200 (50 %) ▼" in line_with(text, "| 4096x4096 nf4")
    assert line_with(text, "| NF4 unpacking over memcpy").endswith("| 1.2 | 1.13 |")
    assert line_with(text, "| DoRA norms of 4096x4096 NF4").endswith("| 10 | 8.20 |")


def test_the_readme_carries_the_figures(tmp_path):
    folder = tmp_path / "results" / "some-cpu"
    taxes(1.5, 1.1).write(folder / "adapter_tax.json")
    readme = tmp_path / "README.md"
    readme.write_text("Fast.\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nMore.\n")
    files = [str(folder / "adapter_tax.json")]

    stale = CliRunner().invoke(report.main, [*files, "--check-readme", str(readme)])
    assert stale.exit_code == 1 and "not those of the results" in stale.output
    assert CliRunner().invoke(report.main, [*files, "--readme", str(readme)]).exit_code == 0
    text = readme.read_text()
    assert text.startswith("Fast.\n") and text.endswith("<!-- bench:end -->\nMore.\n") and "old" not in text
    assert "(results/some-cpu/README.md)" in text and "2026-11-21" in text and "1.50 → 1.10" in text
    assert CliRunner().invoke(report.main, [*files, "--check-readme", str(readme)]).exit_code == 0


@pytest.mark.parametrize("text", ["no marks", f"{report.END} {report.BEGIN}", report.BEGIN])
def test_a_readme_without_marks_is_left_alone(tmp_path, text):
    taxes(1.5, 1.1).write(tmp_path / "adapter_tax.json")
    (tmp_path / "README.md").write_text(text)
    done = CliRunner().invoke(
        report.main, [str(tmp_path / "adapter_tax.json"), "--readme", str(tmp_path / "README.md")]
    )
    assert done.exit_code == 1 and "README.md: needs <!-- bench:begin -->" in done.output
    assert (tmp_path / "README.md").read_text() == text


def test_machines_stand_one_below_the_other():
    won, lost = {"adapter_tax": taxes(2, 1)}, {"adapter_tax": taxes(1, 2)}
    text = readme_block({"a/README.md": won, "b/README.md": lost})
    assert text.index("](a/README.md)") < text.index("2.00 → 1.00") < text.index("](b/README.md)")
    assert "1.00 → 2.00 ▼" in text and "▼ slower than PEFT: 1 of 1 cases." in text


# ---- ops --------------------------------------------------------------------------------------------------


def test_there_is_a_benchmark_for_every_op():
    from pyfastlora.ops import all_ops

    stems = {"glu_forward": "glu", "glu_backward": "glu"}
    assert {stems.get(op.name, op.name) for op in all_ops()} == set(ops.OPS)


def test_ops_are_condensed():
    stats = {"median": 0.002, "min": 0.0019, "q1": 0.00195, "q3": 0.0026, "rounds": 9}
    info = {"op": "glu_forward", "bytes": 4_000_000, "percent_of_copy": 80.0}
    (row,) = ops.condense({"benchmarks": [{"stats": stats, "extra_info": info}]})
    assert row["ms"] == {"median": 2, "min": 1.9, "q1": 1.95, "q3": 2.6, "noisy": True}
    assert (row["gb_s"], row["rounds"], row["op"]) == (2.0, 9, "glu_forward")


def test_basics_count_what_a_layer_keeps(tmp_path):
    rows = [*basics.kept(tokens=64, width=256), basics._row("cold build", "s", [9.0, 7.5, 8.5])]
    values = {row["what"]: row["value"]["median"] for row in rows}
    assert values["cold build"] == 8.5
    for name in basics.KEPT:
        assert 0 < values[f"kept, {name}, ours"] < values[f"kept, {name}, PEFT"]
    # PEFT's float32 copy of x, and of LoRA what both keep: S, 16 numbers of 4 bytes for 256 of 2
    assert values["kept, LoRA, PEFT"] == pytest.approx(2 + 0.125)
    assert values["kept, LoRA, ours"] == pytest.approx(0.125)

    found = {"cpu": "Some CPU", "threads": 2, "kernels": "avx2", "date": "2026-01-01 00:00 UTC"}
    environment = found | dict.fromkeys(("torch", "peft", "bitsandbytes"), "1")
    results = {"basics": Results("basics", environment, {}, rows)}
    assert re.search(r"\| cold build +\| +8.5 s \| +8 s \|", page(results, {}))
    assert "Seconds: cold build 8.5." in readme_block({"page": results})


def test_one_op_end_to_end(tmp_path):
    """In a process of its own: pytest does not run inside pytest."""
    out = tmp_path / "ops.json"
    command = [sys.executable, "-m", "bench.ops", "--quick", "--only", "dora_grad"]
    command += ["--select", "512x2048 and bf16", "--out", str(out)]
    # where pytest-benchmark sees a worker of pytest-xdist it measures nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["variant"]: row["role"] for row in rows} == {
        "cpu": "ours",
        "reference": "ours",
        "torch": "other",
    }
    for row in rows:
        assert row["bytes"] == 3 * 512 * 2048 * 2 + 2 * 2048 * 4
        assert row["percent_of_copy"] > 0 and row["copy_gb_s"] > 0
    assert report.write(tmp_path, report.gather([out])[tmp_path])[1].name == "ops.png"
