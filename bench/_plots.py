"""The results as PNGs: the adapter tax by case, and what the ops reach of a copy's bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench._results import Results
from bench._sections import machine

COLOURS = {
    "PEFT": "#c2571a",
    "ours": "#1f5fa8",
    "floor": "#9a9a9a",
    "other": "#c2571a",
    "reference": "#8fb4dc",
}


def draw(results: Results, folder: Path) -> str:
    """Write <kind>.png into the folder and return its name."""
    import matplotlib

    matplotlib.use("Agg")
    figure = {"adapter_tax": _adapter_tax, "ops": _ops}[results.kind](results)
    name = f"{results.kind}.png"
    figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    return name


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
    import matplotlib.pyplot as plt

    threads = max(row["threads"] for row in results.rows)
    whole = [row for row in results.rows if row["threads"] == threads]
    rows = [row for row in whole if row["case"].startswith(("4096x4096", "512x4096"))] or whole
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
    figure.suptitle(f"Ops\n{_origin(results)}", fontsize=10)
    return figure


def _name(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['case']} {row['dtype']}"


def _label(row: dict[str, Any]) -> str:
    """Of the op's three kinds of others, and of ours the reference apart."""
    return "reference" if row["variant"] == "reference" else str(row["role"])


def _origin(results: Results) -> str:
    return f"{machine(results.environment)}, {results.environment['date']}"
