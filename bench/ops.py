"""`python -m bench.ops`: every bench_<op>.py through pytest-benchmark, condensed to one JSON and a table.

The files also run by themselves: `pytest bench/bench_glu.py`. With FASTLORA_BENCH_DEVICE=cuda they take a
GPU's shapes and tensors; `bench.gpu` then runs them with --stream, where a row is written once it is
measured.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from bench._cases import TAKE_ROW
from bench._environment import environment, load
from bench._results import Results, default_path
from bench._stream import LOST, Sink, context_is_lost, reason_of
from bench._tables import markdown
from bench._timing import Spread

HERE = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def condense(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per benchmark of a pytest-benchmark report: what `measure` noted, and the milliseconds."""
    rows = []
    for entry in report["benchmarks"]:
        stats, info = entry["stats"], entry["extra_info"]
        spread = Spread(stats["median"], stats["min"], stats["q1"], stats["q3"], stats["rounds"])
        gb_s = round(info["bytes"] / spread.median / 1e9, 2)
        rows.append({**info, "ms": spread.to_dict(1e3), "gb_s": gb_s, "rounds": spread.count})
    return rows


HEAD = ("op", "case", "dtype", "threads", "variant", "ms", "GB/s", "% of a copy")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What the run prints at its end."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["op"], row["case"], row["dtype"], row["threads"])):
        ms = f"{row['ms']['median']:.3f}" + ("~" if row["ms"]["noisy"] else "")
        share = f"{row['percent_of_copy']:.0f}"
        lines.append(
            [
                row["op"],
                row["case"],
                row["dtype"],
                str(row["threads"]),
                row["variant"],
                ms,
                str(row["gb_s"]),
                share,
            ]
        )
    note = "\n\n~ interquartile range over 15 % of the median: the machine was noisy"
    return markdown(HEAD, lines, left=3) + (note if any(row["ms"]["noisy"] for row in rows) else "")


def _files(ctx: click.Context, param: click.Parameter, text: str | None) -> list[Path]:
    names = [part.strip() for part in text.split(",")] if text else OPS
    for name in names:
        if name not in OPS:
            raise click.BadParameter(f"{name!r}: choose from {', '.join(OPS)}")
    return [HERE / f"bench_{name}.py" for name in names]


@click.command()
@click.option("--only", "files", callback=_files, help=f"Ops: {','.join(OPS)}.")
@click.option("--select", help='Cases by their ids, as in pytest -k: "bf16 and 4096x4096".')
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: torch's own]")
@click.option("--quick", is_flag=True, help="Few rounds: a look, not a measurement.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the JSON goes.")
@click.option("--stream", type=click.Path(path_type=Path), hidden=True, help="Lines of bench._stream.")
@click.option("--until", type=float, default=math.inf, hidden=True)
@click.option("--skip", type=int, default=0, hidden=True)
def main(
    files: list[Path],
    select: str | None,
    threads: int | None,
    quick: bool,
    out: Path | None,
    stream: Path | None,
    until: float,
    skip: int,
) -> None:
    """Time every op: ours, its reference, what others have, and a copy of as many bytes.

    \b
      python -m bench.ops
      python -m bench.ops --quick --only glu,dequant_4bit --select bf16

    Prints a row per variant. All of it goes to bench/results/<cpu>/ops.json; a part of it is written only
    where --out says.
    """
    if threads:
        torch.set_num_threads(threads)
    if stream:
        sys.exit(_stream(files, select, Sink(stream, until), skip))
    found = environment()
    seconds, rounds = (0.05, 2) if quick else (0.5, 5)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [
            *map(str, files),
            "-q",
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={raw}",
            "--benchmark-quiet",
        ]
        arguments += ["--benchmark-disable-gc", "--benchmark-warmup=on"]
        arguments += [
            "--benchmark-warmup-iterations=2",
            "--benchmark-sort=fullname",
            "--benchmark-columns=median",
        ]
        arguments += [f"--benchmark-max-time={seconds}", f"--benchmark-min-rounds={rounds}"]
        status = pytest.main([*arguments, *(["-k", select] if select else [])])
        if status != pytest.ExitCode.OK or not raw.exists():
            raise click.ClickException(
                f"the benchmarks did not all run (pytest ended with {int(status)}): see above"
            )
        rows = condense(json.loads(raw.read_text()))
    found["load_after"] = load()
    click.echo(
        f"\n{found['cpu']}, {found['threads']} threads, torch {found['torch']}, kernels: {found['kernels']}"
    )
    click.echo(table(rows))
    whole = not quick and not select and len(files) == len(OPS)
    path = out or (default_path("ops", found) if whole else None)
    if path:
        Results("ops", found, {"max_seconds": seconds, "min_rounds": rounds}, rows).write(path)
        click.echo(f"written to {path}; for tables and plots: python -m bench.report {path}")


class _Stream:
    """A pytest plugin: cases in a fixed order, from `skip` on, their rows and failures to a sink."""

    def __init__(self, sink: Sink, skip: int) -> None:
        self._sink, self._skip, self._left, self._at = sink, skip, 0, skip - 1

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[TAKE_ROW] = lambda row: self._sink.write(at=self._at, row=row)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        del items[: self._skip]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._at += 1
        if self._sink.over:
            self._left += 1
            pytest.skip("no time was left")
        self._sink.write(at=self._at, case=item.name)

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        assert call.excinfo is not None
        self._sink.write(at=self._at, failed=reason_of(call.excinfo.value))
        if context_is_lost():
            pytest.exit("the GPU cannot be used any more", returncode=LOST)

    def pytest_sessionfinish(self) -> None:
        if self._left:
            self._sink.write(left=self._left)


def _stream(files: Sequence[Path], select: str | None, sink: Sink, skip: int) -> int:
    """pytest's exit code, 0 where cases failed for reasons that the sink has."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    arguments = [*map(str, files), "-q", *plugins, *(["-k", select] if select else [])]
    status = int(pytest.main(arguments, plugins=[_Stream(sink, skip)]))
    nothing_left = status == pytest.ExitCode.NO_TESTS_COLLECTED and skip > 0
    return 0 if nothing_left or status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else status


if __name__ == "__main__":
    main()
