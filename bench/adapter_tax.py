"""`python -m bench.adapter_tax`: what an adapter costs on top of its frozen base, with PEFT and with ours.

The adapter tax is the time of a forward and backward pass with adapters over that of the frozen dense base
alone (forward and dx; same dtype, same autocast; also where the adapted base is 4-bit). PEFT's layers as
they come, the same layers patched and the base run in turn, and the ratio is taken in every round: see
`bench._timing`.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from bench._environment import environment, load
from bench._results import Results, default_path
from bench._subjects import CONFIGS, FEATURES, TINY, Sizes, Subject, linear, llama
from bench._tables import markdown
from bench._timing import SECONDS, interleave
from pyfastlora.trainer.console import Console

TOKENS = (128, 512, 2048)
MAKERS = {"layer": linear, "model": llama}
# A round on the whole model takes that much longer than one on a layer.
MODEL_SHARE = 2


@dataclass(frozen=True, slots=True)
class Case:
    """What one row of the table measures."""

    level: str  # of MAKERS
    feature: str
    config: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.level} {self.feature} {self.config} T={self.tokens}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one case: rounds at most and at least, and the seconds after which no further round begins."""

    rounds: int
    at_least: int
    seconds: float


# FULL ends within 15 minutes on two cores, whole table.
FULL, QUICK = Limits(40, 5, SECONDS), Limits(3, 3, 1.0)


def cases(
    features: Sequence[str],
    configs: Sequence[str],
    tokens: Sequence[int],
    levels: Sequence[str],
    sizes: Sizes,
) -> list[Case]:
    """The table's rows, in the order in which they are measured."""
    counts = {"layer": tokens, "model": [sizes.batch * sizes.length]}
    return [
        Case(level, f, c, t) for level in levels for c in configs for f in features for t in counts[level]
    ]


def measure(case: Case, subject: Subject, limits: Limits) -> dict[str, Any]:
    """One row: the case, milliseconds of base, PEFT and ours, and the two taxes with their quartiles."""
    difference = subject.difference()
    seconds = limits.seconds * (MODEL_SHARE if case.level == "model" else 1)
    done = interleave(subject.runs, rounds=limits.rounds, at_least=limits.at_least, seconds=seconds)
    return {
        **asdict(case),
        "ms": {name: done.time(name).to_dict(1e3) for name in subject.runs},
        "tax": {name: done.ratio(name, "base").to_dict() for name in ("PEFT", "ours")},
        "speedup": done.ratio("PEFT", "ours").to_dict(),
        "rounds": len(done),
        "difference": float(f"{difference:.2g}"),
        "fallback": subject.fallback(),
    }


def rows_of(wanted: Sequence[Case], sizes: Sizes, limits: Limits) -> Iterator[dict[str, Any]]:
    """Make, measure and drop one case after the other."""
    for case in wanted:
        subject = MAKERS[case.level](FEATURES[case.feature], CONFIGS[case.config], case.tokens, sizes)
        row = measure(case, subject, limits)
        del subject
        gc.collect()  # modules refer to themselves: without this two cases would be in memory at once
        yield row


HEAD = ("level", "dtypes", "adapter", "T", "base ms", "PEFT ms", "our ms", "PEFT tax", "our tax", "PEFT/ours")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What the run prints at its end."""
    lines = [_line(row) for row in rows]
    notes = [f"* {why}" for why in sorted({row["fallback"] for row in rows} - {""})]
    if any("~" in cell for line in lines for cell in line):
        notes.append("~ interquartile range over 15 % of the median: the machine was noisy")
    return "\n".join([markdown(HEAD, lines, left=3), "", *notes]).rstrip()


def _line(row: dict[str, Any]) -> list[str]:
    def cell(figure: dict[str, Any]) -> str:
        return f"{figure['median']:.2f}" + ("~" if figure["noisy"] else "")

    return [
        row["level"],
        row["config"],
        row["feature"] + ("*" if row["fallback"] else ""),
        str(row["tokens"]),
        *(cell(row["ms"][name]) for name in ("base", "PEFT", "ours")),
        *(cell(row["tax"][name]) for name in ("PEFT", "ours")),
        cell(row["speedup"]),
    ]


def _names(known: Sequence[str]) -> Callable[..., list[str]]:
    """A click callback: a comma-separated list of `known` names; all of them by default."""

    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> list[str]:
        names = [part.strip() for part in text.split(",")] if text else list(known)
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}: choose from {', '.join(known)}")
        return names

    return parse


def _counts(ctx: click.Context, param: click.Parameter, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise click.BadParameter(f"{text!r}: needs whole numbers from 1, as in 128,512")
    return counts


@click.command()
@click.option("--only", "features", callback=_names(list(FEATURES)), help=f"Adapters: {','.join(FEATURES)}.")
@click.option("--dtype", "configs", callback=_names(list(CONFIGS)), help=f"Dtypes: {','.join(CONFIGS)}.")
@click.option(
    "--tokens", callback=_counts, default=",".join(map(str, TOKENS)), show_default=True, help="Of the layers."
)
@click.option("--rounds", type=click.IntRange(1), help=f"Rounds at most per case.  [default: {FULL.rounds}]")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    help=f"Per layer case, from its warm-up on.  [default: {FULL.seconds:g}]",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: torch's own]")
@click.option("--layers-only", is_flag=True, help="Leave the model out.")
@click.option("--model-only", is_flag=True, help="Leave the single layers out.")
@click.option("--quick", is_flag=True, help="Few rounds, T = 128 and 512: a look, not a measurement.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the JSON goes.")
@click.option("--tiny", is_flag=True, hidden=True, help="Sizes for a test of this program.")
def main(
    features: list[str],
    configs: list[str],
    tokens: list[int],
    rounds: int | None,
    seconds: float | None,
    threads: int | None,
    layers_only: bool,
    model_only: bool,
    quick: bool,
    out: Path | None,
    tiny: bool,
) -> None:
    """Time LoRA, dropout, DoRA, QLoRA and QDoRA with PEFT and with pyfastlora against the frozen base.

    \b
      python -m bench.adapter_tax
      python -m bench.adapter_tax --quick --only LoRA,DoRA --dtype bf16 --layers-only

    Prints milliseconds and the adapter tax of each case. The whole table goes to
    bench/results/<cpu>/adapter_tax.json; a part of it is written only where --out says.
    """
    if layers_only and model_only:
        raise click.UsageError("--layers-only and --model-only leave nothing to measure")
    levels = ["layer"] * (not model_only) + ["model"] * (not layers_only)
    if quick:
        tokens = [count for count in tokens if count <= 512] or tokens
    limits = QUICK if quick else FULL
    limits = Limits(
        rounds or limits.rounds,
        min(rounds or limits.at_least, limits.at_least),
        limits.seconds if seconds is None else seconds,
    )
    sizes = TINY if tiny else Sizes()
    wanted = cases(features, configs, tokens, levels, sizes)
    whole = limits == FULL and wanted == cases([*FEATURES], [*CONFIGS], TOKENS, [*MAKERS], Sizes())

    console = Console()
    four_bit = {case.feature for case in wanted if FEATURES[case.feature].four_bit}
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        wanted = [case for case in wanted if case.feature not in four_bit]
        console.say(f"left out, because bitsandbytes is not installed: {', '.join(sorted(four_bit))}")
    if threads:
        torch.set_num_threads(threads)
    found = environment()
    begin = time.monotonic()
    rows = _watch(console, wanted, sizes, limits)
    found["load_after"] = load()
    settings = {**asdict(sizes), **asdict(limits), "wall_s": round(time.monotonic() - begin)}
    console.say()
    console.say(
        f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}, kernels: {found['kernels']}"
    )
    console.say(table(rows))
    path = out or (default_path("adapter_tax", found) if whole else None)
    if path:
        Results("adapter_tax", found, settings, rows).write(path)
        console.say(f"written to {path}; for tables and plots: python -m bench.report {path}")


def _watch(console: Console, wanted: Sequence[Case], sizes: Sizes, limits: Limits) -> list[dict[str, Any]]:
    """Run the cases under a progress bar, or with a line for each where nobody watches."""
    rows: list[dict[str, Any]] = []
    with console.bar("adapter tax", len(wanted), "cases") as bar:
        for row in rows_of(wanted, sizes, limits):
            rows.append(row)
            bar.update(len(rows), str(wanted[len(rows)]) if len(rows) < len(wanted) else "")
            if not console.is_terminal:
                peft, ours = (row["tax"][name]["median"] for name in ("PEFT", "ours"))
                case = wanted[len(rows) - 1]
                console.say(
                    f"[{len(rows)}/{len(wanted)}] {case}: tax {peft:.2f} with PEFT, {ours:.2f} with ours"
                )
    return rows


if __name__ == "__main__":
    main()
