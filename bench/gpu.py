"""`python -m bench.gpu`: builds, tests and measures on a GPU in ten minutes; leaves a JSON, a page and plots.

Nothing is downloaded. A step runs in processes of its own and cannot hurt the others: one that fails is
recorded with its reason. What a step measures is written as it comes, so a run that is ended leaves the rest
of it. A step that is done early leaves its time to those behind it, and the layers, which use it, have the
most important cases first.

`--rehearse` takes the same way on a CPU with tiny shapes, into a folder that is thrown away.
"""

from __future__ import annotations

import importlib.metadata
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench._environment import ROOT, gpu_environment, gpu_slug, load, versions
from bench._gpu_run import Outcome, Run, stream
from bench._results import HOME
from bench._stream import GRACE, end_children, ending, plain, reason_of, run_child
from bench._suite import find_sanitizer, run_sanitizer, run_tests, run_the_rest

MINUTES = 9.5
OPS_FIRST = ("dequant_4bit", "glu", "dora_norm", "lora_backward", "lora_shrink", "lora_expand", "lora_grad")


@dataclass(frozen=True, slots=True)
class Step:
    """seconds: its share of a whole run. always: even with no time left."""

    name: str
    seconds: float
    run: Callable[[Run, float], Outcome]
    always: bool = False


# ---- the steps --------------------------------------------------------------------------------------------


def install(run: Run, until: float) -> Outcome:
    """This checkout where it is not installed, then the carried wheels one by one; without an index."""
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check"]
    commands: dict[str, list[str]] = {}
    try:
        importlib.metadata.distribution("pyfastlora")
    except importlib.metadata.PackageNotFoundError:
        commands["pyfastlora"] = [*pip, "--no-build-isolation", "--editable", str(ROOT)]
    if run.wheels:
        names = sorted({path.name.split("-")[0] for path in run.wheels.glob("*.whl")})
        if not names:
            return Outcome("failed", f"no wheels in {run.wheels.name}")
        commands |= {name: [*pip, "--upgrade", "--find-links", str(run.wheels), name] for name in names}
    failed = []
    for name, command in commands.items():
        log = run.scratch / f"install-{name}.log"
        code = run_child(command, run.env, log, until)
        if code != 0:
            failed.append(f"{name}: {ending(code, log)}")
    run.results.environment.update(versions())
    if failed:
        return Outcome("failed", f"{len(commands) - len(failed)} installed; {'; '.join(failed)}")
    return Outcome("done", ", ".join(commands)) if commands else Outcome("skipped", "nothing to install")


def build(run: Run, until: float) -> Outcome:
    """`fastlora build`, timed."""
    log = run.scratch / "build.log"
    fastlora = [sys.executable, "-c", "from pyfastlora.cli.main import main; main()"]
    code = run_child([*fastlora, "build"], run.env, log, until)
    said = log.read_text(errors="replace").strip().splitlines()
    run.add("build", {"said": [plain(line)[:200] for line in said[-12:]]})
    if code != 0:
        click.echo("\n".join(said[-30:]))
        return Outcome("failed", ending(code, log))
    return Outcome(
        "done", ", ".join(line.rpartition("(")[2].rstrip(")") for line in said if line.endswith(")"))
    )


def tests(run: Run, until: float) -> Outcome:
    """What computes on a device, on this one."""
    found = run_tests(run.scratch, run.env, run.device, until, run.rehearse)
    run.add("tests", found.row())
    for failure in found.failures[:10]:
        run.say(f"tests: {failure['test']}: {failure['said']}")
    for reason, count in found.skipped.most_common(10):
        run.say(f"tests: {count} skipped: {reason}")
    complete = not found.failed and not found.skipped["no time was left"]
    return Outcome("done" if complete and found.passed else "failed", found.text)


def machine(run: Run, until: float) -> Outcome:
    """Ceilings, and the assumptions of the cost model."""
    return stream(run, "machine", ["bench._gpu_machine", *["--tiny"] * run.rehearse], until)


def layers(run: Run, until: float) -> Outcome:
    """Adapter tax and memory."""
    return stream(run, "layers", ["bench._gpu_layers", *["--tiny"] * run.rehearse], until)


def ops(run: Run, until: float) -> Outcome:
    """Every op beside a copy."""
    if run.rehearse:
        few = ["--only", "dora_grad", "--select", "512x2048 and bf16"]
        return stream(run, "ops", ["bench.ops", *few], until)
    there = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    order = [*OPS_FIRST, *(name for name in there if name not in OPS_FIRST)]
    return stream(run, "ops", ["bench.ops", "--only", ",".join(order)], until)


def sanitizer(run: Run, until: float) -> Outcome:
    """memcheck and racecheck over the compiled kernels' tests."""
    found = None if run.rehearse else find_sanitizer()
    if not found:
        return Outcome("skipped", "compute-sanitizer is not on PATH" if not run.rehearse else "needs a GPU")
    rows = run_sanitizer(found, run.scratch, run.env, until)
    for tool, row in rows.items():
        run.add("sanitizer", {"tool": tool, **row})
    if all("refused" in row for row in rows.values()):
        return Outcome("skipped", "the sanitizer cannot watch this GPU: Device not supported")
    said = ", ".join(
        f"{tool}: {row.get('findings', '?')} findings in {row['passed'] + row['failed']} tests"
        for tool, row in rows.items()
    )
    clean = all(row.get("findings") == 0 and row["passed"] for row in rows.values())
    return Outcome("done" if clean else "failed", said)


def rest(run: Run, until: float) -> Outcome:
    """The tests that are not about a device, in what time the others left."""
    found = run_the_rest(run.scratch, run.env, until, run.rehearse)
    if found is None:
        return Outcome("skipped", "the time was up before they were done")
    run.add("rest", found.row())
    for failure in found.failures[:10]:
        run.say(f"rest: {failure['test']}: {failure['said']}")
    return Outcome("failed" if found.failed else "done", found.text)


def report(run: Run, until: float) -> Outcome:
    """The page and the plots, from the JSON."""
    from bench.report import write

    run.write()
    return Outcome("done", ", ".join(path.name for path in write(run.folder, {"gpu": run.results})))


STEPS = (
    Step("install", 20, install),
    Step("build", 60, build),
    Step("tests", 130, tests),
    Step("machine", 40, machine),
    Step("layers", 170, layers),
    Step("ops", 80, ops),
    Step("sanitizer", 60, sanitizer),
    Step("rest", 0, rest),
    Step("report", 10, report, always=True),
)


# ---- the run ----------------------------------------------------------------------------------------------


def time_for(at: int, steps: Sequence[Step], left: float, whole: float) -> float:
    """Of step `at`: all of the `left` seconds but what the later steps have been promised of the `whole`."""
    promised = sum(step.seconds for step in steps[at + 1 :]) / sum(step.seconds for step in steps)
    return left - promised * whole


def run_steps(run: Run, steps: Sequence[Step], seconds: float) -> bool:
    """Whether none failed."""
    good = True
    for at, step in enumerate(steps):
        begin = time.time()
        mine = time_for(at, steps, run.began + seconds - begin, seconds)
        run.say(f"{step.name}: up to {max(0, mine):.0f} s")
        try:
            left = mine > GRACE or step.always
            outcome = step.run(run, begin + mine - GRACE) if left else Outcome("skipped", "no time was left")
        except Exception as error:
            outcome = Outcome("failed", reason_of(error))
        good &= outcome.status != "failed"
        taken = round(time.time() - begin, 1)
        run.add(step.name, {"outcome": outcome.status, "said": outcome.said, "seconds": taken})
        run.write()
        run.say(f"{step.name}: {outcome.status} in {taken} s: {outcome.said}")
    return good


def _named(ctx: click.Context, param: click.Parameter, text: str | None) -> list[Step]:
    wanted = [part.strip() for part in text.split(",")] if text else [step.name for step in STEPS]
    for name in wanted:
        if name not in [step.name for step in STEPS]:
            raise click.BadParameter(f"{name!r}: choose from {', '.join(step.name for step in STEPS)}")
    return [step for step in STEPS if step.name in wanted]


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(0.1), default=MINUTES, show_default=True, help="For all of it."
)
@click.option("--only", "steps", callback=_named, help=f"Steps: {','.join(step.name for step in STEPS)}.")
@click.option(
    "--wheels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of wheels to install first, such as bitsandbytes.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results.")
@click.option("--rehearse", is_flag=True, help="The same on the CPU with tiny shapes, thrown away.")
def main(minutes: float, steps: list[Step], wheels: Path | None, out: Path | None, rehearse: bool) -> None:
    """Build, test and measure on this machine's GPU.

    \b
      python -m bench.gpu
      python -m bench.gpu --wheels wheels --minutes 9
      python -m bench.gpu --only layers,ops,report

    Leaves gpu.json, README.md and plots under bench/results/<gpu>. A run of some steps keeps what an earlier
    one of the same commit found in the others. Ends with 1 where a step failed.
    """
    _end_with_children()
    if not rehearse:
        _need_gpu()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "results" if rehearse else HOME / gpu_slug(gpu_environment())
        run = Run(out or home, Path(scratch), rehearse, wheels)
        found = run.results.environment
        run.say(f"{found['gpu']}, torch {found['torch']}, CUDA {found['cuda']}, driver {found['driver']}")
        run.keep_earlier([step.name for step in steps])
        try:
            good = run_steps(run, steps, minutes * 60)
        finally:
            run.results.environment["load_after"] = load()
            run.write()
        run.say("a rehearsal: nothing of it is kept" if rehearse and not out else f"written to {run.path}")
    sys.exit(0 if good else 1)


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU"
        raise click.ClickException(
            f"no GPU: torch {torch.__version__}, built for {built}, sees none; --rehearse takes the CPU"
        )


def _end_with_children() -> None:
    """A request to end, which comes to this process alone, ends what it has started too."""

    def end(number: int, frame: Any) -> None:
        end_children()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


if __name__ == "__main__":
    main()
