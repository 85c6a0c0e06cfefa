"""The processes of a run: which one this is, and what they agree on.

Whoever starts several says so in the environment. torchrun, accelerate, deepspeed and `fastlora train` itself
set RANK, LOCAL_RANK and WORLD_SIZE; srun and mpirun, by which accelerate starts processes on CPUs, have names
of their own, which `join` translates.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from dataclasses import dataclass

from pyfastlora.trainer.errors import UserError

#: Set by our launcher, to a folder for last words. It sends SIGINT for stop; SIGTERM, to the others of a
#: process that has died.
LAUNCHED = "FASTLORA_LAUNCHED"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


@dataclass(frozen=True)
class Processes:
    """This process among `count`: number `rank` of all and `local_rank` of its machine, from 0."""

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


def started_by_others() -> bool:
    """Whether torchrun, accelerate, deepspeed, srun or mpirun started this process as one of several."""
    return "RANK" in os.environ or _tasks() > 1 or any(all(n in os.environ for n in names) for names in _MPI)


def _tasks() -> int:
    """Of srun's step, which may be a shell of one."""
    return int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1


def join() -> Processes:
    """The place of this process. Raises UserError where the environment says only half of it."""
    follow_launcher()
    if "RANK" not in os.environ and _tasks() > 1:
        os.environ |= {ours: os.environ[theirs] for ours, theirs in zip(_OURS, _SLURM, strict=True)}
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
        # two jobs of one machine should not meet
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    for theirs in _MPI:
        if "RANK" not in os.environ and all(name in os.environ for name in theirs):
            os.environ |= {ours: os.environ[name] for ours, name in zip(_OURS, theirs, strict=True)}
            os.environ.setdefault("MASTER_ADDR", "localhost")  # accelerate sets it for several machines
            os.environ.setdefault("MASTER_PORT", "29500")
    given = [name for name in _OURS if name in os.environ]
    if not given:
        return Processes()
    if len(given) < len(_OURS):
        missing = ", ".join(sorted(set(_OURS) - set(given)))
        raise UserError(
            f"{', '.join(given)} of a group of processes is set, {missing} is not; "
            "start with torchrun or --nproc, or unset it"
        )
    return Processes(*(int(os.environ[name]) for name in _OURS))


def follow_launcher() -> None:
    """Ends this process as Ctrl-C does, with a checkpoint, where the one that started it is killed.

    Else its processes would train on, and write where the next run does. Linux alone can tell.
    """
    if sys.platform == "linux" and LAUNCHED in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: "gpu[07-09,12],login1" is gpu07 and others."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else nodes
