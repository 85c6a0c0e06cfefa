"""The page: what came of a run first, then how it went, then all that it was made with.

Whatever comes from a file of the run is escaped where it is put into the page; only text made here is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from pyfastlora.trainer.report.curves import Curve, Point, chart
from pyfastlora.trainer.report.facts import Facts, number
from pyfastlora.trainer.units import GiB, duration, in_words

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6b7280; --line: #d7dbe0; --back: #fff;
  --one: #2563eb; --two: #d97706; --three: #059669; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #343a42;
  --back: #15181c; --one: #6ea0ff; --two: #f5a742; --three: #3ecf9b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p, small, figcaption small, th { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; font-weight: normal;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { white-space: nowrap; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; white-space: pre; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  max-height: 16rem; overflow-y: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--soft); } .y { text-anchor: end; dominant-baseline: middle; }
.x { text-anchor: middle; } .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; } .hidden { opacity: 0; } .hidden:hover { opacity: 1; }
polyline.c0 { stroke: var(--one); } polyline.c1 { stroke: var(--two); } polyline.c2 { stroke: var(--three); }
circle.c0 { fill: var(--one); } circle.c1 { fill: var(--two); } circle.c2 { fill: var(--three); }
span.c0, span.c1, span.c2 { margin-right: .7rem; } span.c0 { color: var(--one); }
span.c1 { color: var(--two); } span.c2 { color: var(--three); }
"""


def page(facts: Facts) -> str:
    """The whole document."""
    name = escape(facts.path.resolve().name)
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in _sections(facts) if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body><h1>{name}</h1>"
        f"<p>{escape(_state(facts))}</p>{_summary(facts)}{body}</body></html>\n"
    )


def _sections(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "Curves", _curves(facts)
    yield "Before and after", _samples(facts)
    yield "Events", _events(facts)
    yield "Memory", _memory(facts)
    yield "Kernels", f"<pre>{escape(facts.kernels)}</pre>" if facts.kernels else ""
    yield "Data", _data(facts.data)
    yield "Strategy", _table(facts.strategy)
    yield "Environment", _table(facts.environment)
    yield "Configuration", _configuration(facts)


def _state(facts: Facts) -> str:
    begun = f"begun {facts.started:%Y-%m-%d %H:%M} UTC, " if facts.started else ""
    end = facts.events("end")
    if end:
        return f"{begun}finished after step {facts.steps}"
    return f"{begun}not finished: the log ends at step {facts.steps}"


def _summary(facts: Facts) -> str:
    tokens, trained = facts.tokens
    start = next(iter(facts.events("start")), {})
    shown: dict[str, str] = {"base model": str(facts.config.get("base_model", ""))}
    if facts.records:
        shown["last loss"] = f"{number(facts.records[-1]['loss']):.4f}"
    if facts.held_out:
        first, last = facts.held_out[0], facts.held_out[-1]
        shown["held-out loss"] = f"{last[1]:.4f}"
        if len(facts.held_out) > 1:
            shown[f"held-out loss at step {first[0]}"] = f"{first[1]:.4f}"
        if (best := facts.best_held_out) and best[0] != last[0]:
            shown[f"lowest, at step {best[0]}"] = f"{best[1]:.4f}"
    shown |= {"tokens": f"{tokens:,}", "trained tokens": f"{trained:,}"}
    if facts.seconds:
        shown["tokens/s"] = f"{tokens / facts.seconds:,.0f}"
        shown["time in steps"] = duration(facts.seconds)
    if "trained_parameters" in start:
        shown["trained parameters"] = f"{start['trained_parameters']:,}"
    if "device" in start:
        shown["device"] = str(start["device"])
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items())
    return f"<dl>{cells}</dl>"


def _curves(facts: Facts) -> str:
    def points(key: str, unit: float = 1) -> list[Point]:
        return [(float(r["step"]), number(r[key]) / unit) for r in facts.records if key in r]

    held_out = [(float(step), loss) for step, loss in facts.held_out]
    charts: tuple[tuple[str, Sequence[Curve], Callable[[float], str]], ...] = (
        (
            "Loss per trained token",
            (Curve("training batches", points("loss")), Curve("held out", held_out, marked=True)),
            lambda y: f"{y:.4g}",
        ),
        ("Learning rate", (Curve("learning rate", points("learning_rate")),), lambda y: f"{y:.3g}"),
        ("Gradient norm", (Curve("before clipping", points("grad_norm")),), lambda y: f"{y:.3g}"),
        (
            "Throughput",
            (
                Curve("tokens/s", points("tokens_per_second")),
                Curve("trained tokens/s", points("trained_tokens_per_second")),
            ),
            lambda y: f"{y:,.0f}",
        ),
        (
            "Memory of the first process",
            (Curve("in use", points("memory_bytes", GiB)), Curve("peak", points("memory_peak_bytes", GiB))),
            lambda y: f"{y:.4g} GiB",
        ),
    )
    drawn = "".join(chart(title, curves, form) for title, curves, form in charts)
    bad = [r for r in facts.records if not math.isfinite(number(r["loss"]))]
    note = f"<p>The loss is no number at step {bad[0]['step']}.</p>" if bad else ""
    return f'{note}<div class="curves">{drawn}</div>' if drawn else note


def _samples(facts: Facts) -> str:
    samples = facts.samples.get("samples", [])
    if not samples:
        return ""
    step = facts.samples.get("step")
    after = f"after step {step}" if step is not None else "after"
    rows = [
        [_answer(s.get(k)) for k in ("prompt", "wanted", "before", "after")]
        for s in samples
        if isinstance(s, Mapping)
    ]
    head = ("prompt, held out", "wanted", "before", after)
    return f"<p>The likeliest token at each place, {facts.samples.get('tokens', 64)} at most.</p>" + _rows(
        head, rows
    )


def _answer(text: Any) -> str:
    if text is None:
        return "<small>not asked</small>"
    return f'<div class="answer">{escape(str(text))}</div>' if text else "<small>nothing</small>"


def _events(facts: Facts) -> str:
    told = [line for line in facts.log if line.get("event") in ("spike", "resume")]
    rows = []
    for line in told:
        rest = {k: v for k, v in line.items() if k not in ("event", "time", "step")}
        cells = (line.get("time", ""), line["event"], line.get("step", ""))
        rows.append([*(escape(str(cell)) for cell in cells), _table(rest)])
    return _rows(("time", "what", "step", "more"), rows) if rows else ""


def _memory(facts: Facts) -> str:
    plan, measured = facts.plan.get("planned"), facts.plan.get("measured_bytes")
    if not facts.plan:
        return ""
    rows = []
    if plan:
        rows += [(name, in_words(count)) for name, count in plan.get("bytes", {}).items()]
        rows.append((f"planned in all, fullest in {plan.get('fullest')}", in_words(plan["total_bytes"])))
    else:
        rows.append(("not planned", str(facts.plan.get("not_planned", ""))))
    rows.append(("measured, at most", "not measured" if measured is None else in_words(measured)))
    if plan and measured:
        rows.append(("planned / measured", f"{plan['total_bytes'] / measured:.3f}"))
    words = "<p>Tensors of one process; libraries and the allocator's gaps are not among them.</p>"
    return words + _rows(("", ""), [[escape(a), escape(b)] for a, b in rows])


def _data(data: Mapping[str, Any]) -> str:
    """Datasets side by side, if they are counted alike; then the rest."""
    sets = data.get("datasets", {})
    rest = {k: v for k, v in data.items() if k != "datasets"}
    if not isinstance(sets, Mapping) or not sets:
        return _table(data)
    keys = list(dict.fromkeys(key for counts in sets.values() for key in counts))
    rows = [
        [escape(text) for text in (name, *(_words(counts.get(key, "")) for key in keys))]
        for name, counts in sets.items()
    ]
    return _rows(("", *(key.replace("_", " ") for key in keys)), rows) + _table(rest)


def _configuration(facts: Facts) -> str:
    resolved = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
    return (
        f"<details open><summary>As it was written</summary><pre>{escape(facts.original)}</pre></details>"
        f"<details><summary>Every key with its value</summary><pre>{escape(resolved)}</pre></details>"
    )


def _table(values: Any) -> str:
    """Names and values; a mapping among the values is a table of its own."""
    if not isinstance(values, Mapping):
        return escape(_words(values))
    rows = [
        f"<tr><th>{escape(str(name))}</th><td>{_table(value)}</td></tr>"
        for name, value in values.items()
        if value not in (None, "", {}, [])
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    title = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{title}</tr>' if any(head) else ''}{body}</table>"


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | list):
        return str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"
