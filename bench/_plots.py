"""The results as PNGs: the adapter tax by case, measured and predicted, and what ops reach of a copy's
bandwidth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench._gpu_page import LAUNCH_BOUND, gpu_of, predicted
from bench._results import Results
from bench._sections import machine

COLOURS = {
    "PEFT": "#c2571a",
    "ours": "#1f5fa8",
    "floor": "#9a9a9a",
    "other": "#c2571a",
    "reference": "#8fb4dc",
}


def draw(results: Results, folder: Path) -> list[str]:
    """Write the PNGs of a kind into the folder and return their names."""
    import matplotlib

    matplotlib.use("Agg")
    figures = {
        "adapter_tax": {"adapter_tax": _adapter_tax},
        "ops": {"ops": _ops},
        "basics": {},
        "gpu": {"gpu_tax": _gpu_taxes, "gpu_ops": _gpu_ops},
    }[results.kind]
    names = []
    for stem, made in figures.items():
        figure = made(results)
        if figure is not None:
            names.append(f"{stem}.png")
            figure.savefig(folder / names[-1], dpi=110, metadata={"Software": None})
    return names


def _adapter_tax(results: Results) -> Any:
    """Configs down, numbers of tokens and the model across; in a panel, PEFT and ours by adapter."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    configs = list(dict.fromkeys(row["config"] for row in results.rows))
    columns = sorted({(row["level"], row["tokens"]) for row in results.rows})
    features = list(dict.fromkeys(row["feature"] for row in results.rows))
    figure, axes = plt.subplots(
        len(configs),
        len(columns),
        figsize=(3.1 * len(columns) + 0.6, 2.3 * len(configs) + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, config in zip(axes, configs, strict=True):
        for panel, (level, tokens) in zip(line, columns, strict=True):
            panel.axhline(1, color="#444444", linewidth=0.8)
            rows = [
                r for r in results.rows if (r["config"], r["level"], r["tokens"]) == (config, level, tokens)
            ]
            for name, shift in (("PEFT", -0.12), ("ours", 0.12)):
                at = [features.index(row["feature"]) + shift for row in rows]
                taxes = [row["tax"][name] for row in rows]
                middle = [tax["median"] for tax in taxes]
                ends = [[m - t["q1"] for m, t in zip(middle, taxes, strict=True)]]
                ends += [[t["q3"] - m for m, t in zip(middle, taxes, strict=True)]]
                panel.errorbar(at, middle, ends, fmt="o", color=COLOURS[name], markersize=5, label=name)
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(axis="y", linewidth=0.4, alpha=0.6)
            panel.set_xticks(range(len(features)), features, fontsize=8)
            if config == configs[0]:
                panel.set_title(f"{'Llama' if level == 'model' else 'linear'}, T = {tokens}", fontsize=10)
        line[0].set_ylabel(config, fontsize=9)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Adapter tax (frozen base = 1)\n{_origin(results)}", fontsize=11)
    return figure


def _ops(results: Results) -> Any:
    """A line per case of 4096 columns with all threads, a dot per variant."""
    threads = max(row["threads"] for row in results.rows)
    whole = [row for row in results.rows if row["threads"] == threads]
    rows = [row for row in whole if row["case"].startswith(("4096x4096", "512x4096"))] or whole
    return _shares(rows, _origin(results))


def _shares(rows: list[dict[str, Any]], origin: str) -> Any:
    """A line per case, a dot per variant, by the share of a copy's bandwidth."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(_name(row) for row in rows))[::-1]
    figure, panel = plt.subplots(figsize=(9, 0.21 * len(names) + 1.6), layout="constrained")
    panel.axvline(100, color="#444444", linewidth=0.8)
    for label in ("other", "floor", "reference", "ours"):
        chosen = [row for row in rows if _label(row) == label]
        at = [names.index(_name(row)) for row in chosen]
        shares = [max(row["percent_of_copy"], 0.1) for row in chosen]
        panel.plot(shares, at, "o", color=COLOURS[label], markersize=5, label=label, alpha=0.9)
    panel.set_xscale("log")
    panel.set_xlabel("% of the bandwidth of a copy of as many bytes")
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.margins(y=0.01)
    panel.grid(linewidth=0.4, alpha=0.6)
    panel.legend(fontsize=8, loc="lower left")
    figure.suptitle(f"Ops\n{origin}", fontsize=10)
    return figure


def _gpu_taxes(results: Results) -> Any | None:
    """Models down, numbers of tokens across; in a panel, PEFT and ours by adapter, a bar where the model
    says.
    """
    import matplotlib.pyplot as plt

    rows = [row for row in results.rows if row.get("level") == "linears"]
    if not rows:
        return None
    models = list(dict.fromkeys(row["model"] for row in rows))
    tokens = sorted({row["tokens"] for row in rows})
    cases = list(dict.fromkeys(_case(row) for row in rows))
    size = (3.4 * len(tokens) + 0.6, 2.5 * len(models) + 0.9)
    figure, axes = plt.subplots(
        len(models), len(tokens), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    gpu = gpu_of(results)
    for line, model in zip(axes, models, strict=True):
        for panel, t in zip(line, tokens, strict=True):
            panel.axhline(1, color="#444444", linewidth=0.8)
            for row in (row for row in rows if (row["model"], row["tokens"]) == (model, t)):
                for at, (variant, tax) in enumerate(row["tax"].items()):
                    x = cases.index(_case(row)) + 0.2 * (at - 1.5)
                    who, _, adapter = variant.partition(" ")
                    panel.plot(x, tax["median"], "os"[adapter == "bf16"], color=COLOURS[who], markersize=5)
                    guess = predicted(gpu, row, variant)
                    if guess is not None:
                        panel.plot(x, guess, "_", color="#222222", markersize=11)
            panel.set_xticks(range(len(cases)), cases, fontsize=7, rotation=30, ha="right")
            panel.grid(axis="y", linewidth=0.4, alpha=0.6)
            panel.set_title(f"{model}, T = {t}", fontsize=9)
    figure.suptitle(
        "Adapter tax in GPU time, float32 adapters (circles) and bfloat16 (squares); bars: predicted\n"
        + _gpu_origin(results),
        fontsize=9,
    )
    return figure


def _gpu_ops(results: Results) -> Any | None:
    """Cases past the size where a launch decides."""
    rows = [row for row in results.rows if "op" in row]
    large = [row for row in rows if row["bytes"] >= LAUNCH_BOUND] or rows
    return _shares(large, _gpu_origin(results)) if large else None


def _case(row: dict[str, Any]) -> str:
    return f"{row['storage']} {row['feature']}"


def _gpu_origin(results: Results) -> str:
    return f"{results.environment['gpu']}, {results.environment['date']}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['case']} {row['dtype']}"


def _label(row: dict[str, Any]) -> str:
    """Of the op's three kinds of others, and of ours the reference apart."""
    return "reference" if row["variant"] == "reference" else str(row["role"])


def _origin(results: Results) -> str:
    return f"{machine(results.environment)}, {results.environment['date']}"
