"""The results as Markdown: one page per machine, and the block of the project's README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import _gpu_page
from bench._results import Results
from bench._tables import markdown
from bench._targets import DEQUANT_OVER_MEMCPY, DORA_NORM_MS, HOST, TAXES
from bench._timing import SECONDS

NOISY, SLOWER, NOT_FUSED = "~", "▼", "*"
SCATTER = "noisy: the middle half of the measurements is wider than 15 % of the median"
LEGEND = (
    f"{SLOWER} ours is slower than PEFT, or than another's code for the op; {NOISY} {SCATTER}; "
    f"{NOT_FUSED} PEFT's own forward ran in ours too."
)
TAX = (
    "The adapter tax is the time of a forward and backward pass with adapters over that of the frozen dense "
    "base alone (forward and dx, same dtypes, same autocast). Base, PEFT and ours run in turn; ratios are "
    "taken in every round, medians are quoted. In `bf16+fp32` the base is bfloat16, the adapters are float32."
)
BASICS = (
    "Seconds of processes that start, medians; the quickstart trains its base model first. What a layer with "
    "float32 adapters keeps for its backward pass, beyond its input and its parameters, is counted in units "
    "of that input, in bfloat16."
)
COMMITS = (
    "The commit is that of the sources that were measured; [../README.md](../README.md#commits) names those "
    "that are no longer in the history."
)
LEVELS = {
    "layer": "One linear layer, {width} x {width}, r = {rank}",
    "model": "A Llama of {layers} layers, {hidden} wide, {batch} x {length} tokens, all linears, r = {rank}",
}
Row = dict[str, Any]


def page(found: dict[str, Results], plots: dict[str, list[str]]) -> str:
    """The README of one machine's folder. found: by kind; plots: file names by kind."""
    if "gpu" in found:
        return _gpu_page.page(found["gpu"], plots.get("gpu", []))
    environment = next(iter(found.values())).environment
    parts = [
        f"# {machine(environment)}",
        "Written by `python -m bench.report` from the JSON files of this folder; "
        "[../README.md](../README.md) says how to measure again.",
        _environments(found),
        COMMITS,
        LEGEND,
    ]
    if "adapter_tax" in found:
        parts += _taxes(found["adapter_tax"], plots)
    if "ops" in found:
        parts += _ops(found["ops"], plots)
    if "basics" in found:
        parts += ["## What is waited for, and what is kept", BASICS, basics_table(found["basics"].rows)]
    targets = _targets(found)
    if targets:
        parts += ["## Beside the targets", *targets]
    return "\n\n".join(parts) + "\n"


def readme_block(pages: Mapping[str, dict[str, Results]]) -> str:
    """What stands between the marks of the project's README: a table and a few figures per machine.

    pages: the results by the link to their page.
    """
    parts: list[str] = []
    for link, found in pages.items():
        environment = next(iter(found.values())).environment
        if "gpu" in found:
            versions = f"torch {environment['torch']}, peft {environment['peft']}"
            parts.append(f"[{environment['gpu']}]({link}), {versions}, {environment['date'].split()[0]}:")
            parts.append(_gpu_page.summary(found["gpu"]))
            continue
        packages = ", ".join(f"{name} {environment[name]}" for name in ("torch", "peft", "bitsandbytes"))
        parts.append(f"[{machine(environment)}]({link}), {packages}, {environment['date'].split()[0]}:")
        if "adapter_tax" in found:
            rows = found["adapter_tax"].rows
            slower = sum(row["speedup"]["median"] < 1 for row in rows)
            parts += [
                _summary(rows),
                f"{SLOWER} slower than PEFT: {slower} of {len(rows)} cases. {NOISY} {SCATTER}. "
                f"{_rounds(found['adapter_tax'])}",
            ]
        if "ops" in found:
            parts += [
                line for line in (_dequant_line(found["ops"].rows), _norm_line(found["ops"].rows)) if line
            ]
        if "basics" in found:
            parts.append(_basics_line(found["basics"].rows))
        if "adapter_tax" in found and (lines := _target_taxes(found["adapter_tax"].rows)):
            parts.append(_reached_line(lines, link))
    return "\n\n".join(parts)


def machine(environment: dict[str, Any]) -> str:
    """ "AMD EPYC 9R45, 2 threads, avx512 kernels"."""
    threads, level = environment["threads"], environment["kernels"]
    kernels = f"{level} kernels" if " " not in level else "no compiled kernels"
    return f"{environment['cpu']}, {threads} thread{'s' * (threads != 1)}, {kernels}"


def _environments(found: dict[str, Results]) -> str:
    """What each file was measured with, side by side."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{v} with {k} thread{'s' * (k != '1')}" for k, v in value.items())
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    names = dict.fromkeys(name for results in found.values() for name in results.environment)
    rows = [
        [name.replace("_", " "), *(text(results.environment.get(name, "")) for results in found.values())]
        for name in names
    ]
    return markdown(["", *found], rows, left=1 + len(found))


# ---- adapter tax ------------------------------------------------------------------------------------------


def _taxes(results: Results, plots: dict[str, list[str]]) -> Iterator[str]:
    yield "## Adapter tax"
    yield f"{TAX} {_rounds(results)}"
    if "adapter_tax" in plots:
        yield f"![Adapter tax of PEFT and of this library]({plots['adapter_tax'][0]})"
    for level, title in LEVELS.items():
        for config in dict.fromkeys(row["config"] for row in results.rows if row["level"] == level):
            yield f"### {title.format(**results.settings)}: {config}"
            chosen = [row for row in results.rows if (row["level"], row["config"]) == (level, config)]
            head = ["adapter", "T", "base ms", "PEFT ms", "our ms", "PEFT tax", "our tax", "PEFT / ours"]
            yield markdown(head, [_tax_cells(row) for row in chosen])
    reasons = sorted({row["fallback"] for row in results.rows} - {""})
    if reasons:
        yield "\n".join(f"{NOT_FUSED} {reason}" for reason in reasons)


def _rounds(results: Results) -> str:
    """How long was measured, and whether that is what a run does when it is told nothing."""
    taken: dict[str, list[int]] = {}
    for row in results.rows:
        taken.setdefault(row["level"], []).append(row["rounds"])
    counts = [
        f"{min(rounds)} for a {level}"
        if min(rounds) == max(rounds)
        else f"{min(rounds)} to {max(rounds)} for a {level} (median {statistics.median(rounds):g})"
        for level, rounds in taken.items()
    ]
    seconds, at_least = results.settings["seconds"], results.settings["at_least"]
    shortened = f" A shortened run: the default is {SECONDS:g} s." * (seconds < SECONDS)
    return (
        f"Rounds: {', '.join(counts)}; none began after {seconds:g} s of a case (twice that for a model) but "
        f"to make {at_least}.{shortened}"
    )


def _tax_cells(row: Row) -> list[str]:
    slower = row["speedup"]["median"] < 1
    return [
        row["feature"] + NOT_FUSED * bool(row["fallback"]),
        str(row["tokens"]),
        *(_figure(row["ms"][name], digits=2) for name in ("base", "PEFT", "ours")),
        _figure(row["tax"]["PEFT"], digits=2),
        _figure(row["tax"]["ours"], digits=2) + f" {SLOWER}" * slower,
        _figure(row["speedup"], digits=2),
    ]


def _figure(figure: Row, digits: int) -> str:
    return f"{figure['median']:.{digits}f}" + NOISY * figure["noisy"]


def _summary(rows: Sequence[Row]) -> str:
    """Adapters down, cases across, "PEFT's tax -> ours" in the cells."""
    columns = {
        **{f"layer, bf16, T = {t}": ("layer", "bf16", t) for t in _tokens(rows, "layer")},
        **{
            f"Llama, {c}, T = {t}": ("model", c, t)
            for c in ("bf16", "bf16+fp32 autocast")
            for t in _tokens(rows, "model")
        },
    }
    by_key = {(row["level"], row["config"], row["tokens"], row["feature"]): row for row in rows}
    used = {name: key for name, key in columns.items() if any(known[:3] == key for known in by_key)}
    lines = []
    for feature in dict.fromkeys(row["feature"] for row in rows):
        cells = [_arrow(by_key.get((*key, feature))) for key in used.values()]
        lines.append([feature, *cells])
    return markdown(["adapter tax, PEFT → ours", *used], lines)


def _arrow(row: Row | None) -> str:
    if row is None:
        return ""
    peft, ours = (_figure(row["tax"][name], digits=2) for name in ("PEFT", "ours"))
    return (
        f"{peft} → {ours}" + f" {SLOWER}" * (row["speedup"]["median"] < 1) + NOT_FUSED * bool(row["fallback"])
    )


def _tokens(rows: Sequence[Row], level: str) -> list[int]:
    return sorted({row["tokens"] for row in rows if row["level"] == level})


# ---- ops --------------------------------------------------------------------------------------------------


def _ops(results: Results, plots: dict[str, list[str]]) -> Iterator[str]:
    yield "## Ops"
    yield (
        "Milliseconds, and in brackets the share of a copy's bandwidth: the bytes the op has to read and "
        "write over its time, against a copy of as many bytes timed right before and after it. memcpy and "
        "dense are floors, which do less than the op."
    )
    if "ops" in plots:
        yield f"![Share of a copy's bandwidth]({plots['ops'][0]})"
    for op in dict.fromkeys(row["op"] for row in results.rows):
        chosen = [row for row in results.rows if row["op"] == op]
        variants = list(dict.fromkeys(row["variant"] for row in chosen))
        cases: dict[tuple[str, str, int], dict[str, Row]] = {}
        for row in chosen:
            cases.setdefault((row["case"], row["dtype"], row["threads"]), {})[row["variant"]] = row
        lines = [
            [case, dtype, str(threads), *(_op_cell(by_variant, variant) for variant in variants)]
            for (case, dtype, threads), by_variant in cases.items()
        ]
        yield f"### {op}"
        yield markdown(["case", "dtype", "threads", *variants], lines, left=2)


def _op_cell(by_variant: dict[str, Row], variant: str) -> str:
    row = by_variant.get(variant)
    if row is None:
        return ""
    first = next(iter(by_variant.values()))  # the best of ours
    others = [other["ms"]["median"] for other in by_variant.values() if other["role"] == "other"]
    behind = row is first and row["role"] == "ours" and bool(others) and min(others) < row["ms"]["median"]
    return f"{_figure(row['ms'], digits=3)} ({row['percent_of_copy']:.0f} %)" + f" {SLOWER}" * behind


def _best(rows: Sequence[Row], op: str, **wanted: Any) -> Row | None:
    """The row of our best implementation of one case."""
    wanted = {"op": op, "role": "ours", **wanted}
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _dequant(rows: Sequence[Row]) -> list[Row]:
    """4096 x 4096, per dtype and thread count."""
    keys = dict.fromkeys((row["dtype"], row["threads"]) for row in rows if row["op"] == "dequant_4bit")
    found = [_best(rows, "dequant_4bit", case="4096x4096", dtype=d, threads=t) for d, t in keys]
    return [row for row in found if row]


def _norm(rows: Sequence[Row]) -> list[Row]:
    found = [
        _best(rows, "dora_norm", case="4096x4096 nf4 r=16", dtype=d, threads=1) for d in ("bf16", "fp32")
    ]
    return [row for row in found if row]


def _dequant_line(rows: Sequence[Row]) -> str:
    figures = [
        f"{_figure(row['ratio']['memcpy'], 2)} ({row['dtype']}, {_threads(row)})" for row in _dequant(rows)
    ]
    text = f"Unpacking a 4096 x 4096 NF4 weight over a memcpy of the bytes written: {', '.join(figures)}."
    return text * bool(figures)


def _norm_line(rows: Sequence[Row]) -> str:
    figures = [f"{_figure(row['ms'], digits=2)} ms ({row['dtype']})" for row in _norm(rows)]
    return f"DoRA's norms of a 4096 x 4096 NF4 layer on one thread: {', '.join(figures)}." * bool(figures)


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] != 1)}"


# ---- basics -----------------------------------------------------------------------------------------------


def basics_table(rows: Sequence[Row]) -> str:
    """A line per figure of `bench.basics`, beside its target."""

    def text(value: float | None, unit: str) -> str:
        return "" if value is None else f"{value:.3g} {unit}".rstrip()

    lines = [
        [row["what"], text(row["value"]["median"], row["unit"]), text(row["at_most"], row["unit"])]
        for row in rows
    ]
    return markdown(["figure", "here", "target, at most"], lines)


def _basics_line(rows: Sequence[Row]) -> str:
    """The times, for the project's README."""
    seconds = {row["what"]: row["value"]["median"] for row in rows if row["unit"] == "s"}
    return "Seconds: " + ", ".join(f"{what} {value:.3g}" for what, value in seconds.items()) + "."


# ---- targets ----------------------------------------------------------------------------------------------


def _targets(found: dict[str, Results]) -> list[str]:
    """Paragraphs; none where no measured case has a target."""
    taxes = _target_taxes(found["adapter_tax"].rows) if "adapter_tax" in found else []
    ops = found["ops"].rows if "ops" in found else []
    parts = []
    if taxes:
        parts.append(
            f"The targets were set for {HOST}, from PEFT's tax measured there. This page was measured on "
            f"{machine(found['adapter_tax'].environment)}."
        )
        head = ["case", "adapter", f"PEFT, {HOST}", "target there", "PEFT, here", "ours, here"]
        parts.append(markdown(head, taxes, left=2))
    lines = [
        [
            f"NF4 unpacking over memcpy, 4096x4096 {row['dtype']}, {_threads(row)}",
            f"{DEQUANT_OVER_MEMCPY}",
            _figure(row["ratio"]["memcpy"], 2),
        ]
        for row in _dequant(ops)
    ]
    lines += [
        [
            f"DoRA norms of 4096x4096 NF4, {row['dtype']}, 1 thread, ms",
            f"{DORA_NORM_MS:.0f}",
            _figure(row["ms"], 2),
        ]
        for row in _norm(ops)
    ]
    if lines:
        parts.append(markdown(["op", "target, at most", "here"], lines))
    return parts


def _reached_line(lines: Sequence[Sequence[str]], link: str) -> str:
    """How many of the targets were reached, for the project's README."""
    reached = sum(float(line[-1].rstrip(NOISY)) <= float(line[3]) for line in lines)
    return (
        f"Of {len(lines)} target taxes, set for {HOST}, {reached} are reached on this machine "
        f"([all of them]({link}#beside-the-targets))."
    )


def _target_taxes(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        target = TAXES.get((row["level"], row["config"], row["tokens"]), {}).get(row["feature"])
        if target:
            here = [_figure(row["tax"][name], digits=2) for name in ("PEFT", "ours")]
            case = f"{row['level']}, {row['config']}, T = {row['tokens']}"
            lines.append([case, row["feature"], *(f"{value:.2f}" for value in target), *here])
    return lines
