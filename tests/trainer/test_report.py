"""report.html: all that a run has to show, on one page that asks nobody for anything and runs nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pyfastlora.cli.main import main
from pyfastlora.trainer import job
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.report import curves
from pyfastlora.trainer.report.facts import Facts
from pyfastlora.trainer.samples import NEW_TOKENS

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;</pre></span>'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a run with samples, evaluations and a name that is HTML."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"instruction": f"greet {n % 3} {EVIL}", "input": "", "output": "hello " * (1 + n % 3)}
        for n in range(24)
    ]
    (folder / "d<b>a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cfg.yaml").write_text(
        f"# as written {EVIL}\nbase_model: {tiny_model}\n"
        f'datasets: [{{path: "{folder}/d<b>a.jsonl", type: alpaca}}]\nval_set_size: 4\n'
        "adapter: lora\nlora_target_linear: true\nlora_r: 8\nlora_alpha: 16\nsequence_len: 256\n"
        "micro_batch_size: 4\nlearning_rate: 5e-2\nbf16: false\nmax_steps: 8\nlr_scheduler: linear\n"
        f"save_strategy: no\neval_on_start: true\neval_steps: 4\nreport_samples: 2\n"
        f'dataset_prepared_path: {folder}/prepared\noutput_dir: "{folder}/o<i>ut"\n'
    )
    job.train(load_config(folder / "cfg.yaml"), Console(io.StringIO()))
    return folder / "o<i>ut"


class Page(HTMLParser):
    """The elements of a page, its text, and the text of the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return (out / "report.html").read_text()


def records(out: Path, event: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_the_numbers_of_a_run(out, html):
    page, lines = Page(html), records(out)
    losses = [x["eval_loss"] for x in records(out, "eval")]
    for wanted in (
        "finished after step 8",
        f"{lines[-1]['loss']:.4f}",
        f"{losses[-1]:.4f}",
        f"held-out loss at step 0{losses[0]:.4f}",
        f"trained tokens{sum(x['trained_tokens'] for x in lines):,}",
        "fused 14 of 14 LoRA linears",
        (out / "kernels.txt").read_text(),
        (out / "config.original.yaml").read_text(),
        (out / "config.resolved.yaml").read_text(),
        json.loads((out / "env.json").read_text())["packages"]["torch"],
        "single",
    ):
        assert wanted in page.text, wanted
    plan = json.loads((out / "plan.json").read_text())
    mib = [f"{n / 2**20:.1f} MiB" for n in (plan["planned"]["total_bytes"], plan["measured_bytes"])]
    assert ["planned in all, fullest in forward and backward", mib[0]] in page.rows
    assert ["measured, at most", mib[1]] in page.rows
    ((name, counts),) = json.loads((out / "data.json").read_text())["datasets"].items()
    assert "d<b>a.jsonl" in name
    rows = [row[:5] for row in page.rows if row and row[0] == name]
    assert rows == [[name, "24", "24", f"{counts['tokens']:,}", str(counts["trained_tokens"])]]


def test_samples_before_and_after(out, html):
    """Answers are greedy: those of the base without the adapter, and with it, as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load_config(out / "config.resolved.yaml").config
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(config.base_model, dtype="float32")
    model = PeftModel.from_pretrained(base, out).eval()
    found = json.loads((out / "samples.json").read_text())
    assert found["step"] == 8 and len(found["samples"]) == 2
    assert len({s["prompt"] for s in found["samples"]}) == 2
    rows = {row[0]: row[1:] for row in Page(html).rows if len(row) == 4}
    for sample in found["samples"]:
        assert EVIL in sample["prompt"] and sample["wanted"].startswith("hello ")
        ids = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with model.disable_adapter():
            assert greedy(model, ids, tokenizer) == sample["before"]
        assert greedy(model, ids, tokenizer) == sample["after"] != sample["before"]
        told = [sample[k].replace("\r", "\n") or "nothing" for k in ("wanted", "before", "after")]
        assert [cell.replace("\r", "\n") for cell in rows[sample["prompt"]]] == told


def greedy(model: Any, ids: torch.Tensor, tokenizer: Any) -> str:
    """The likeliest token, one by one, without a cache."""
    start = ids.shape[1]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.reshape(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_samples_change_nothing(out, tmp_path, adapter):
    """The same run without them has the same losses, and calls its modules as often."""
    given = [f"adapter={adapter}", "report_samples=0", f"output_dir={tmp_path}/none"]
    job.train(load_config(out.parent / "cfg.yaml", given), Console(io.StringIO()))
    if adapter == "qlora":
        given = ["adapter=qlora", "report_samples=1", f"output_dir={tmp_path}/some"]
        job.train(load_config(out.parent / "cfg.yaml", given), Console(io.StringIO()))
        out = tmp_path / "some"
    assert not (tmp_path / "none" / "samples.json").exists() and (out / "samples.json").exists()
    assert "Before and after" not in (tmp_path / "none" / "report.html").read_text()
    one, other = ([(x["loss"], x["grad_norm"]) for x in records(at)] for at in (out, tmp_path / "none"))
    assert one == other and len(one) == 8
    one, other = ((at / "kernels.json").read_text() for at in (out, tmp_path / "none"))
    assert one == other


def test_nothing_of_a_run_becomes_html(html):
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "b", "i", "object"}
    assert not [attrs for _, attrs in page.elements if {"src", "href", "onerror"} & attrs.keys()]
    assert "url(" not in html and "@import" not in html
    assert page.text.count(EVIL) >= 3  # the file as it was, two prompts
    policy = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_points_are_where_the_log_says(out, html):
    """Decoded with the labels of the axes alone."""
    figures = {
        re.search(r"<figcaption>([^<]+?) <", f)[1]: f for f in re.findall(r"<figure>.*?</figure>", html, re.S)
    }
    assert list(figures) == [
        *("Loss per trained token", "Learning rate", "Gradient norm", "Throughput"),
        "Memory of the first process",
    ]
    lines = records(out)
    for title, keys in (
        ("Loss per trained token", ("loss",)),
        ("Learning rate", ("learning_rate",)),
        ("Gradient norm", ("grad_norm",)),
        ("Throughput", ("tokens_per_second", "trained_tokens_per_second")),
    ):
        for n, key in enumerate(keys):
            found = decoded(figures[title], n)
            assert len(found) == len(lines) == 8
            high = max(abs(x[key]) for x in lines)
            for (step, value), line in zip(found, lines, strict=True):
                assert step == pytest.approx(line["step"], abs=0.05)
                assert value == pytest.approx(line[key], abs=0.02 * high)
    held_out = decoded(figures["Loss per trained token"], 1)
    wanted = [(x["step"], x["eval_loss"]) for x in records(out, "eval")]
    assert held_out == [(pytest.approx(s, abs=0.05), pytest.approx(v, rel=0.02)) for s, v in wanted]


def decoded(figure: str, curve: int) -> list[tuple[float, float]]:
    """Steps and values of the dots of a curve, from where they stand."""
    y = re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="y">([-\d.,e+]+)<', figure)
    x = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="x">(\d+)<', figure)
    dots = re.findall(rf'<circle class="c{curve} [^"]*" cx="([\d.]+)" cy="([\d.]+)"', figure)
    return [(along(x, float(cx)), along(y, float(cy))) for cx, cy in dots]


def along(labels: list[tuple[str, str]], place: float) -> float:
    (a, first), (b, last) = labels[0], labels[-1]
    first, last = (float(v.replace(",", "")) for v in (first, last))
    return first + (place - float(a)) / (float(b) - float(a)) * (last - first)


def test_many_records_become_few_points():
    drawn = curves.chart("t", [curves.Curve("c", [(i, float(i % 10)) for i in range(10_000)])], str)
    assert drawn.count("<circle") == 400 and "the mean of up to 25 records" in drawn
    points = curves.thinned([(i, float(i)) for i in range(801)])
    assert len(points) == 267 and points[0] == (2, 1.0) and points[-1] == (800, 799.0)


@pytest.mark.parametrize("values", [[float("nan")], [], [0.0], [1e-9, 1e-9], [-3.0, 7.0], [5e20, 1.0]])
def test_curves_of_odd_values(values):
    drawn = curves.chart("t", [curves.Curve("c", list(enumerate(values)))], str)
    assert ("<svg" in drawn) == bool(values and values[0] == values[0])
    for height in map(float, re.findall(r'cy="([^"]+)"', drawn)):
        assert 0 <= height <= curves.HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.98, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (4, 4, [2, 3, 4, 5, 6])],
)
def test_ticks_are_round(low, high, wanted):
    assert curves.ticks(low, high) == pytest.approx(wanted)


def copied(out: Path, to: Path) -> Path:
    shutil.copytree(out, to)
    (to / "report.html").unlink()
    return to


def test_a_run_that_was_killed(out, tmp_path):
    """No end, half a line at the end of the log, no samples after, a loss that is no number."""
    place = copied(out, tmp_path / "run")
    lines = (place / "log.jsonl").read_text().splitlines()
    fourth = json.dumps(records(out)[3] | {"loss": "nan", "step": 5})
    (place / "log.jsonl").write_text("\n".join([*lines[:6], fourth, '{"event": "tra']))
    for name in ("samples.json", "kernels.txt", "plan.json", "strategy.json"):
        (place / name).unlink()
    result = CliRunner().invoke(main, ["report", str(place), "--output", str(tmp_path / "r.html")])
    assert result.exit_code == 0 and result.stdout == f"{tmp_path}/r.html\n"
    assert not (place / "report.html").exists()
    text = Page((tmp_path / "r.html").read_text()).text
    assert "not finished: the log ends at step 5" in text and "The loss is no number at step 5." in text
    assert Facts.read(place).finished is False and "Kernels" not in text


def test_a_run_that_is_stopped_has_a_report(config_file, write_jsonl, alpaca_rows, tmp_path):
    """Of a loss that is no number; a mistake before the first step leaves none."""
    config = config_file(write_jsonl(alpaca_rows), "fastlora: false\n")
    for overrides, there in (
        (["lora_target_modules=[no_such]", "lora_target_linear=false"], False),
        (["learning_rate=1e30", "optimizer=sgd", "max_grad_norm=0"], True),
    ):
        given = [part for o in overrides for part in ("--set", o)]
        result = CliRunner().invoke(main, ["train", str(config), *given])
        assert result.exit_code != 0
        assert (tmp_path / "out" / "report.html").exists() == there, result.output
    assert "not finished" in (tmp_path / "out" / "report.html").read_text()


def test_a_disk_without_room_takes_nothing_from_the_run(
    config_file, write_jsonl, alpaca_rows, tmp_path, monkeypatch
):
    """It is told that there is no report."""
    def full(facts: Facts) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfastlora.trainer.report.page", full)
    config = config_file(write_jsonl(alpaca_rows))
    told = io.StringIO()
    job.train(load_config(config, ["max_steps=1", "fastlora=false"]), Console(told))
    assert f"no report: [Errno 28] No space left on device; fastlora report {tmp_path}/out" in told.getvalue()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_no_run(tmp_path):
    for place, why in ((tmp_path, "has no config.resolved.yaml"), (tmp_path / "none", "no such folder")):
        result = CliRunner().invoke(main, ["report", str(place)])
        assert result.exit_code == 2
        assert result.stderr == f"Error: {place}: {why}; give the output_dir of a run\n"


def browser() -> str:
    """The one that FASTLORA_BROWSER names, which must be there; else one that is found, or a skipped test."""
    if named := os.environ.get("FASTLORA_BROWSER"):
        if shutil.which(named) is None:
            pytest.fail(f"FASTLORA_BROWSER: {named}: no such program; install one, such as Debian's chromium")
        return named
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: set FASTLORA_BROWSER, or put one of {', '.join(BROWSERS)} on PATH")
    return found


def test_it_opens_in_a_browser(out, tmp_path):
    """Laid out as it should be, without a request to anywhere, and without a script of the run's."""
    shutil.copy(out / "report.html", tmp_path / "report.html")
    probe = (
        "<script>onload = () => { const all = [...document.querySelectorAll('svg circle')];"
        "const seen = all.filter(c => c.getBoundingClientRect().width > 0).length;"
        "const wide = document.documentElement.scrollWidth <= innerWidth;"
        "const asked = performance.getEntriesByType('resource').length;"
        "document.body.dataset.seen = [seen, wide, asked, document.scripts.length].join(' ') }</script>"
    )
    with (tmp_path / "probed.html").open("w") as file:  # the page's own policy would not let it run
        page = (out / "report.html").read_text()
        file.write(page.replace("default-src 'none'", "default-src * 'unsafe-inline'") + probe)
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path}/profile", "--window-size=1200,900", "--dump-dom"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
    )
    dumps = []
    for name in ("report.html", "probed.html"):
        command = [browser(), *flags, (tmp_path / name).as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr  # an error of the page, or what its policy refused
        dumps.append(done.stdout)
    page = Page(dumps[0])
    assert not page.of("script") and len(page.of("svg")) == 5
    dots = 8 * (1 + 1 + 1 + 2 + 2) + len(records(out, "eval"))
    assert len(page.of("circle")) == dots
    assert page.text.count(EVIL) >= 3
    assert Page(dumps[1]).of("body")[0]["data-seen"] == f"{dots} true 0 1"
