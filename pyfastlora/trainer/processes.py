"""The processes of a run: which one this is, and what they agree on.

Whoever starts several says so in the environment. torchrun, accelerate, deepspeed and `fastlora train` itself
set RANK, LOCAL_RANK and WORLD_SIZE; srun has names of its own, which `join` translates.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pyfastlora.trainer.errors import UserError

#: Set by our launcher, to a folder for last words. It sends SIGINT for stop; SIGTERM, to the others of a
#: process that has died.
LAUNCHED = "FASTLORA_LAUNCHED"
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


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


def join() -> Processes:
    """The place of this process. Raises UserError where the environment says only half of it."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1
    if "RANK" not in os.environ and tasks > 1:
        os.environ |= {ours: os.environ[theirs] for ours, theirs in _SLURM.items()}
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
        # two jobs of one machine should not meet
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if not given:
        return Processes()
    if len(given) < len(names):
        missing = ", ".join(sorted(set(names) - set(given)))
        raise UserError(
            f"{', '.join(given)} of a group of processes is set, {missing} is not; "
            "start with torchrun or --nproc, or unset it"
        )
    return Processes(*(int(os.environ[name]) for name in names))


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: "gpu[07-09,12],login1" is gpu07 and others."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else nodes
