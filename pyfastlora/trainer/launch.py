"""Starts the processes of a run on this machine, through torch.distributed.run's agent, and waits for them.

A process that fails says why in a file of its own. The one that failed first is shown; the rest, which mostly
fail for want of it, are not. SIGINT and SIGTERM reach every process as SIGINT: save and stop. What the agent
sends to the others of a process that has died is SIGTERM, which ends them at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import ConfigError, StoppedError, UserError
from pyfastlora.trainer.hints import add_hint
from pyfastlora.trainer.processes import LAUNCHED, started_by_others
from pyfastlora.trainer.strategy import needs_process_group

_START = "from pyfastlora.cli.main import main; main()"


@dataclass(frozen=True)
class Layout:
    """How many processes, and where. endpoint: host:port where several machines find each other."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0


def wanted_processes(config: Config, nproc: int | None, nnodes: int, max_restarts: int = 0) -> int:
    """How many processes to start here; 0: this is one that somebody started, or one is enough.

    Raises ConfigError for --nproc or --nnodes to a process that was started as one of several.
    """
    if started_by_others():
        if nproc is not None or nnodes > 1:
            raise ConfigError(
                "--nproc and --nnodes start processes, and this one was started as one of several (torchrun, "
                "accelerate, deepspeed, srun, mpirun); leave them out"
            )
        return 0
    if nproc is None:
        import torch

        nproc = max(1, torch.cuda.device_count())
    return nproc if nproc * nnodes > 1 or max_restarts or needs_process_group(config) else 0


def launch(arguments: Sequence[str], layout: Layout) -> None:
    """Runs `fastlora ARGUMENTS` in every process. Raises UserError with what the first one failed of."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if layout.nnodes > 1 and layout.endpoint is None:
        raise ConfigError("--nnodes needs --rdzv-endpoint HOST:PORT, the same on every machine")
    if layout.node_rank >= layout.nnodes:
        raise ConfigError(
            f"--node-rank counts from 0, must be less than --nnodes ({layout.nnodes}); got {layout.node_rank}"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // layout.nproc)))
    # a store for each attempt: in a shared one the second finds addresses of the first, and waits for them
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if layout.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what this machine's name means
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # of failures we tell ourselves
    config = LaunchConfig(
        min_nodes=layout.nnodes,
        max_nodes=layout.nnodes,
        nproc_per_node=layout.nproc,
        run_id="fastlora" if layout.endpoint else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=layout.endpoint or "localhost:0",
        local_addr="localhost" if layout.nnodes == 1 else None,
        rdzv_configs={"is_host": layout.node_rank == 0} if layout.nnodes > 1 else {},
        max_restarts=layout.max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    with tempfile.TemporaryDirectory(prefix="fastlora-") as folder, _forwarding():
        os.environ[LAUNCHED] = folder
        try:
            elastic_launch(config, sys.executable)("-c", _START, *arguments)
        except ChildFailedError as error:
            raise _first(Path(folder), error.failures) from None
        finally:
            del os.environ[LAUNCHED]
        stops = _told(Path(folder))
        if stops:
            raise StoppedError(stops[0]["text"])


@contextmanager
def failures_told() -> Iterator[None]:
    """In a process that `launch` started: leaves word of what it fails of, and prints nothing."""
    folder = os.environ.get(LAUNCHED)
    if folder is None:
        yield
        return
    try:
        yield
    except StoppedError as error:
        _tell(folder, str(error), error.exit_code)  # no failure to the agent: it would start again
    except UserError as error:
        _tell(folder, str(error), error.exit_code)
        os._exit(error.exit_code)  # not to wait for others in a process group that is left
    except Exception as error:
        add_hint(error)
        _tell(folder, traceback.format_exc(), 1)
        os._exit(1)


def _tell(folder: str, text: str, exit_code: int) -> None:
    rank = int(os.environ["RANK"])
    told = {"rank": rank, "time": time.time(), "text": text, "exit_code": exit_code}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    Path(folder, f"{attempt}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def _told(folder: Path) -> list[dict[str, Any]]:
    """What the processes of the last attempt said, in the order of time."""
    last = max((int(p.name.partition("-")[0]) for p in folder.glob("*.json")), default=0)
    told = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob(f"{last}-*.json")]
    return sorted(told, key=lambda one: float(one["time"]))


def _first(folder: Path, failures: dict[int, Any]) -> UserError:
    """The error of the process that failed first; one ended by a signal could not say so itself."""
    ended = {rank: -failure.exitcode for rank, failure in failures.items() if failure.exitcode < 0}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    if killed:
        rank, number = next(iter(killed.items()))
        hint = "; often the system does that when memory is short" if number == signal.SIGKILL else ""
        return UserError(f"process {rank} was ended by {signal.Signals(number).name}{hint}")
    told = _told(folder)
    if not told:
        rank, failure = next(iter(failures.items()))
        return UserError(f"process {rank} ended with exit code {failure.exitcode} and said nothing")
    name = f"process {told[0]['rank']}: " if told[0]["rank"] else ""
    error = UserError(f"{name}{told[0]['text']}")
    error.exit_code = told[0]["exit_code"]
    return error


@contextmanager
def _forwarding() -> Iterator[None]:
    """Signals to this process go to those it started."""
    import psutil

    def forward(number: int, frame: Any) -> None:
        sent = number if number == signal.SIGUSR1 else signal.SIGINT
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(sent)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
