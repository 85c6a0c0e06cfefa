"""`python -m bench.basics`: seconds to build, load and start, bytes kept for a backward pass, the quickstart.

The figures beside the taxes: what a user waits for once, and what a layer costs in memory. Every figure with
a target in `_targets.BASICS` is shown beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import pyfastlora
from bench._environment import ROOT, environment, load
from bench._results import Results, default_path
from bench._sections import basics_table
from bench._subjects import Feature, adapt
from bench._targets import BASICS
from bench._timing import Spread

Row = dict[str, Any]

FASTLORA = Path(sys.executable).with_name("fastlora")
# In a process of their own, as every figure here is of a process that starts; torch is there already.
BUILD = """
import time, torch, torch.utils.cpp_extension
from pyfastlora import _jit
from pyfastlora.ops import _native
recipe, started = _native.recipe(), time.perf_counter()
_jit.build(recipe, force=True)
print(time.perf_counter() - started)
"""
LOAD = """
import time, torch
from pyfastlora.ops import _native
started = time.perf_counter()
assert _native.why_not() is None
print(time.perf_counter() - started)
"""
START = f"""
import subprocess, time
started = time.perf_counter()
subprocess.run([{str(FASTLORA)!r}, "--help"], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - started)
"""
KEPT = {
    "LoRA": Feature(),
    "dropout": Feature(dropout=0.1),
    "DoRA": Feature(dora=True),
    "DoRA, dropout": Feature(dora=True, dropout=0.1),
}


def starts(rounds: int) -> Iterator[Row]:
    """Seconds to build the CPU's kernels from nothing, to load them, and to print the help."""
    with tempfile.TemporaryDirectory() as cache:
        for what, code in (("cold build", BUILD), ("warm load", LOAD), ("fastlora --help", START)):
            yield _row(what, "s", [float(_said(code, cache)) for _ in range(rounds)])


def kept(tokens: int = 512, width: int = 1024) -> Iterator[Row]:
    """What a bfloat16 layer with float32 adapters keeps beyond x and the parameters, in units of x."""
    for name, feature in KEPT.items():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(width, width, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
        x = torch.randn(tokens, width).bfloat16().requires_grad_()
        peft = adapt(base, ["0"], feature, torch.float32, rank=16)
        ours = deepcopy(peft)
        pyfastlora.patch(ours)
        for whose, model in (("PEFT", peft), ("ours", ours)):
            yield _row(f"kept, {name}, {whose}", "x", [_kept_bytes(model, x) / (2 * x.numel())])


def _kept_bytes(model: nn.Module, x: Tensor) -> int:
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    total = sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in known)
    del y
    return total


def quickstart() -> Iterator[Row]:
    """The whole of `fastlora quickstart` on a machine that has no base model yet."""
    with tempfile.TemporaryDirectory() as folder:
        run = [FASTLORA, "quickstart", "--dir", f"{folder}/run"]
        subprocess.run(run, cwd=ROOT, env={**os.environ, "FASTLORA_CACHE": f"{folder}/cache"}, check=True)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    yield _row("quickstart", "s", [summary["seconds"]])
    yield _row("quickstart, held-out loss before", "", [summary["held_out_loss_before"]])
    yield _row("quickstart, held-out loss after", "", [summary["held_out_loss_after"]])
    comparison = summary["comparison"]
    speedup = comparison["fast_tokens_per_second"] / comparison["peft_tokens_per_second"]
    yield _row("quickstart, tokens/s over PEFT's", "x", [speedup])
    yield _row("quickstart, largest difference of the losses", "", [comparison["largest_difference"]])


def _said(code: str, cache: str) -> str:
    env = {**os.environ, "FASTLORA_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout.splitlines()[-1]


def _row(what: str, unit: str, values: list[float]) -> Row:
    return {"what": what, "unit": unit, "value": Spread.of(values).to_dict(), "at_most": BASICS.get(what)}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of what starts.")
@click.option("--without-quickstart", is_flag=True, help="Leave its six minutes out.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the JSON goes.")
def main(rounds: int, without_quickstart: bool, out: Path | None) -> None:
    """Time what a user waits for once, and count what a layer keeps.

    \b
      python -m bench.basics
      python -m bench.basics --without-quickstart --out basics.json

    Builds the kernels and trains the quickstart's base model in a cache of their own. The whole table goes to
    bench/results/<cpu>/basics.json; a part of it is written only where --out says.
    """
    found = environment()
    rows = [*starts(rounds), *kept(), *(() if without_quickstart else quickstart())]
    found["load_after"] = load()
    click.echo(basics_table(rows))
    path = out or (None if without_quickstart else default_path("basics", found))
    if path:
        Results("basics", found, {"rounds": rounds}, rows).write(path)
        click.echo(f"written to {path}; for tables: python -m bench.report {path}")


if __name__ == "__main__":
    main()
