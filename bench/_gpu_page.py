"""What `bench.gpu` found as Markdown: the page of a GPU's folder, and its lines in the project's README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench import cost_model
from bench._results import Results
from bench._tables import markdown
from bench._targets import GPU_OP_SHARE, GPU_SAVED, GPU_TAXES, GPU_WALL
from bench.cost_model import MODELS, Gpu, Shape

Row = dict[str, Any]
ADAPTERS = ("fp32+ac", "bf16")
LAUNCH_BOUND = 10_000_000  # bytes below which a kernel is judged in us: they take less than a launch
NOTES = (
    "The *adapter tax* is the time of a forward and backward pass with adapters over that of the frozen "
    "dense bfloat16 base (forward and dx). `fp32+ac`: float32 adapters under bfloat16 autocast; `bf16`: "
    "bfloat16 adapters. The tax is in GPU time, between the first and the last kernel with the host out "
    "of the way; *wall* is that of steps in a row. Base, PEFT and ours take turns; medians are quoted, "
    "`~` where the middle half is wider than 15 % of the median. Behind / stands what "
    "`bench.cost_model` predicts. `▼`: slower than PEFT; `!`: ours and PEFT differ by more than 5 %; "
    "`*`: PEFT's own forward ran in ours too."
)
OPS = (
    "Microseconds of the GPU with cold caches, and in brackets the share of the bandwidth of a copy of "
    f"as many bytes in the same turns (aimed at: {GPU_OP_SHARE} %). Below {LAUNCH_BOUND // 10**6} MB a "
    f"kernel is judged by its time beside an empty launch{{launch}}. *Predicted*: the bytes at 90 % of "
    "the copy's rate, and 2 us. *wall*: calls in a row with the host, of the first variant."
)
MEMORY = (
    "MB that a forward keeps for its backward, inputs included and weights apart; behind / the most "
    "that a step holds beyond what is there before it, gradients included."
)
LEVELS = {
    "linears": "The seven linears of a layer",
    "block": "The same with the activation between gate/up and down",
    "compiled": "Beside PEFT under torch.compile",
    "rivals": "Beside other projects' kernels",
}


def page(results: Results, plots: Sequence[str]) -> str:
    """The README of a GPU's folder."""
    found = results.environment
    rehearsed = ["**A rehearsal on a CPU: no figure here says anything.**"] * results.settings["rehearsal"]
    parts = [
        f"# {found['gpu']}",
        "Written by `python -m bench.gpu`; [../README.md](../README.md) says how to measure again.",
        *rehearsed,
        markdown(["", ""], [[name.replace("_", " "), _text(value)] for name, value in found.items()], left=2),
        *_run(results),
        *_tests(results),
        *_taxes(results, plots),
        *_targets(results),
        *_memory(results),
        *_ops(results, plots),
        *_machine(results),
        *_left_out(results),
    ]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """For the project's README: the taxes of an 8B layer's linears."""
    lines = []
    for row in _rows(results, "layers", "tax"):
        if (row["level"], row["model"]) == ("linears", "8B"):
            cells = [_arrow(row, adapter, of) for of in ("tax", "wall_tax") for adapter in ADAPTERS]
            lines.append([f"{row['storage']} {row['feature']}, T = {row['tokens']}", *cells])
    head = ["Adapter tax of an 8B layer, PEFT → ours"]
    head += [f"{of}, {adapter}" for of in ("GPU", "wall") for adapter in ADAPTERS]
    return markdown(head, lines) if lines else "No layer was measured."


def gpu_of(results: Results) -> Gpu | None:
    """The ceilings that the model goes by for these results."""
    found = [row["gpu"] for row in _rows(results, "machine", "gpu")]
    return Gpu(**found[-1]) if found else cost_model.known(results.environment["gpu"])


def predicted(gpu: Gpu | None, row: Row, variant: str, design: str = "linear") -> float | None:
    """The model's tax for a variant of a layers row; None where it has no such way."""
    shape: Shape | None = MODELS.get(row["model"])
    who, _, adapter = variant.partition(" ")
    kind = "Q" * (row["storage"] == "NF4") + row["feature"]
    way = f"PEFT {adapter} {kind}" if who == "PEFT" else f"ours {kind}"
    if who == "ours" and row["feature"] == "LoRA":
        way += f" {design}"
    if gpu is None or shape is None:
        return None
    try:
        return cost_model.tax(
            gpu, shape, row["tokens"], way, rank=row["rank"], glu=row["level"] in ("block", "rivals")
        )
    except ValueError:
        return None


# ---- parts ------------------------------------------------------------------------------------------------


def _run(results: Results) -> Iterator[str]:
    yield "## The run"
    outcomes = _rows(results, None, "outcome")
    lines = [[row["step"], row["outcome"], _cell(row["said"]), f"{row['seconds']:.0f}"] for row in outcomes]
    yield markdown(["step", "outcome", "", "s"], lines, left=3)
    for row in _rows(results, "build", "said"):
        if isinstance(row["said"], list):
            yield "```\n" + "\n".join(row["said"]) + "\n```"


def _tests(results: Results) -> Iterator[str]:
    rows = _rows(results, "tests", "passed")
    tools = _rows(results, "sanitizer", "tool")
    if not rows and not tools:
        return
    yield "## Tests on the device"
    for row in rows:
        skipped = sum(row["skipped"].values())
        yield f"{row['passed']} passed, {row['failed']} failed, {skipped} skipped."
        if row["failures"]:
            lines = [[failure["test"], _cell(failure["said"])] for failure in row["failures"]]
            yield markdown(["failed", ""], lines, left=2)
        if row["skipped"]:
            lines = [[_cell(reason), str(count)] for reason, count in row["skipped"].items()]
            yield markdown(["skipped", "tests"], lines)
    if tools:
        lines = [
            [
                row["tool"],
                row.get("refused") or str(row.get("findings")),
                str(row["passed"]),
                str(row["failed"]),
            ]
            for row in tools
        ]
        yield markdown(["compute-sanitizer", "findings", "passed", "failed"], lines)


def _taxes(results: Results, plots: Sequence[str]) -> Iterator[str]:
    rows = _rows(results, "layers", "tax")
    if not rows:
        return
    yield "## Adapter tax"
    yield NOTES
    yield from (f"![Adapter tax, measured and predicted]({name})" for name in plots if "tax" in name)
    gpu = gpu_of(results)
    for level, title in LEVELS.items():
        for model in dict.fromkeys(row["model"] for row in rows if row["level"] == level):
            chosen = [row for row in rows if (row["level"], row["model"]) == (level, model)]
            yield f"### {title}: {model}"
            yield markdown(*_tax_table(chosen, gpu))


def _tax_table(rows: Sequence[Row], gpu: Gpu | None) -> tuple[list[str], list[list[str]]]:
    """GPU tax and, behind /, the model's; then wall."""
    variants = list(dict.fromkeys(name for row in rows for name in row["tax"]))
    head = ["adapter", "T", "base ms", *variants]
    head += ["K-extension predicted"] * any(row["feature"] == "LoRA" for row in rows)
    head += [f"wall, {name}" for name in variants]
    lines = []
    for row in rows:
        cells = [_measured(row, name, gpu) for name in variants]
        goal = predicted(gpu, row, "ours fp32+ac", "kext") if row["feature"] == "LoRA" else None
        walls = [_figure(row["wall_tax"].get(name)) for name in variants]
        extra = [_number(goal)] * (len(head) - 3 - 2 * len(variants))
        marks = "*" * bool(row["fallback"]) + "!" * any(value > 0.05 for value in row["difference"].values())
        base = _figure(row["ms"]["base"], digits=3)
        lines.append(
            [f"{row['storage']} {row['feature']}{marks}", str(row["tokens"]), base, *cells, *extra, *walls]
        )
    return head, lines


def _measured(row: Row, variant: str, gpu: Gpu | None) -> str:
    figure = row["tax"].get(variant)
    if figure is None:
        return ""
    guess = predicted(gpu, row, variant)
    return _figure(figure) + f" / {_number(guess)}" * (guess is not None) + " ▼" * _slower(row, variant)


def _slower(row: Row, variant: str) -> bool:
    who, _, adapter = variant.partition(" ")
    peft = row["tax"].get(f"PEFT {adapter}")
    return who == "ours" and peft is not None and row["tax"][variant]["median"] > peft["median"]


def _targets(results: Results) -> Iterator[str]:
    """What was aimed at on an H200, and what was reached here."""
    rows = {
        (row["level"], row["model"], row["storage"], row["feature"], row["tokens"]): row
        for row in _rows(results, "layers", "tax")
    }
    lines = []
    for key, target in GPU_TAXES.items():
        row = rows.get(("linears", *key))
        if row:
            here = [_figure(row["tax"].get(f"ours {adapter}")) for adapter in ADAPTERS]
            lines.append([f"tax, GPU time, {key[0]} {key[1]} {key[2]}, T = {key[3]}", f"{target:.2f}", *here])
    row = rows.get(("linears", *GPU_WALL[0]))
    if row and "PEFT bf16" in row["wall_ms"]:
        here = [f"{_over(row['wall_ms'], adapter):.2f}" for adapter in ADAPTERS]
        lines.append(["PEFT over ours, wall time, 8B bf16 LoRA, T = 512", f"{GPU_WALL[1]:.2f}", *here])
    row = rows.get(("block", *GPU_SAVED[0]))
    if row and "PEFT bf16" in row["saved_bytes"]:
        here = [f"{1 / _over(row['saved_bytes'], adapter):.2f}" for adapter in ADAPTERS]
        lines.append(["saved bytes of a block, ours over PEFT's", f"{GPU_SAVED[1]:.2f}", *here])
    if lines:
        yield "## Beside the targets"
        yield f"Set for {cost_model.H200.name}; this is {results.environment['gpu']}."
        yield markdown(["", "target", *(f"ours {adapter}" for adapter in ADAPTERS)], lines)


def _over(figures: dict[str, Any], adapter: str) -> float:
    """PEFT's over ours."""
    peft, ours = (figures[f"{who} {adapter}"] for who in ("PEFT", "ours"))
    return float(peft["median"] / ours["median"] if isinstance(peft, dict) else peft / ours)


def _memory(results: Results) -> Iterator[str]:
    rows = [row for row in _rows(results, "layers", "tax") if row["level"] in ("linears", "block")]
    if not rows:
        return
    yield "## Memory of a step"
    yield MEMORY
    variants = list(dict.fromkeys(name for row in rows for name in row["saved_bytes"]))
    lines = []
    for row in rows:
        case = f"{row['model']} {row['level']}, {row['storage']} {row['feature']}, T = {row['tokens']}"
        lines.append([case, *(_megabytes(row, name) for name in variants)])
    yield markdown(["", *variants], lines)


def _megabytes(row: Row, variant: str) -> str:
    if variant not in row["saved_bytes"]:
        return ""
    peak = row["peak_bytes"].get(variant)
    return f"{row['saved_bytes'][variant] / 1e6:.0f}" + (f" / {peak / 1e6:.0f}" if peak is not None else "")


def _ops(results: Results, plots: Sequence[str]) -> Iterator[str]:
    rows = _rows(results, "ops", "op")
    if not rows:
        return
    gpu = gpu_of(results)
    launch = [row["value"] for row in _rows(results, "machine", "question") if row["case"] == "alone"]
    yield "## Ops"
    yield OPS.format(launch=f", {launch[-1]:.1f} us here" if launch else "")
    yield from (f"![Share of a copy's bandwidth]({name})" for name in plots if "ops" in name)
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        variants = list(dict.fromkeys(row["variant"] for row in chosen))
        cases: dict[tuple[str, str], dict[str, Row]] = {}
        for row in chosen:
            cases.setdefault((row["case"], row["dtype"]), {})[row["variant"]] = row
        lines = []
        for (case, dtype), by_variant in cases.items():
            first = next(iter(by_variant.values()))
            guess = f"{cost_model.Cost(gpu, 1).kernel(first['bytes'], cold=True) * 1e6:.1f}" if gpu else ""
            cells = [_op_cell(by_variant.get(variant)) for variant in variants]
            wall = f"{first['wall_ms']['median'] * 1e3:.1f}"
            lines.append([case, dtype, f"{first['bytes'] / 1e6:.1f}", guess, *cells, wall])
        yield f"### {op}"
        yield markdown(["case", "dtype", "MB", "predicted us", *variants, "wall us"], lines, left=2)


def _op_cell(row: Row | None) -> str:
    if row is None:
        return ""
    share = "" if row["bytes"] < LAUNCH_BOUND else f" ({row['percent_of_copy']:.0f} %)"
    return f"{row['ms']['median'] * 1e3:.1f}{'~' * row['ms']['noisy']}{share}"


def _machine(results: Results) -> Iterator[str]:
    rows = _rows(results, "machine", "question")
    if not rows:
        return
    yield "## What the cost model assumes"
    lines = []
    for row in rows:
        assumed = "" if row["assumed"] is None else f"{row['assumed']:g}"
        lines.append([row["question"], row["case"], f"{row['value']:g} {row['unit']}", assumed])
    yield markdown(["question", "case", "measured", "assumed"], lines, left=2)
    for row in _rows(results, "machine", "implementations"):
        chosen = ", ".join(f"{op}: {name}" for op, name in row["implementations"].items())
        yield f"Implementations that run for bfloat16 here: {chosen}."


def _left_out(results: Results) -> Iterator[str]:
    reasons: dict[str, None] = {}
    for row in results.rows:
        if "failed" in row and "case" in row:
            reasons[f"{row['step']}: {row['case']}: {_cell(row['failed'])}"] = None
        for name, why in row.get("left_out", {}).items():
            reasons[f"{row['level']}, {row['storage']}: {name}: {_cell(why)}"] = None
        if row.get("fallback"):
            reasons[f"* {row['fallback']}"] = None
    if reasons:
        yield "## Left out"
        yield "\n".join(f"- {reason}" for reason in reasons)


# ---- cells ------------------------------------------------------------------------------------------------


def _rows(results: Results, step: str | None, key: str) -> list[Row]:
    return [row for row in results.rows if key in row and step in (None, row["step"])]


def _figure(figure: Row | None, digits: int = 2) -> str:
    return "" if figure is None else f"{figure['median']:.{digits}f}" + "~" * figure["noisy"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _arrow(row: Row, adapter: str, of: str) -> str:
    ours, peft = (row[of].get(f"{who} {adapter}") for who in ("ours", "PEFT"))
    if ours is None:
        return ""
    slower = peft is not None and ours["median"] > peft["median"]
    return f"{_figure(peft) or 'none'} → {_figure(ours)}" + " ▼" * slower


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
