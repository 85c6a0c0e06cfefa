"""One of the processes of a group: runs jobs one after the other, and writes how each ended.

python -m torch.distributed.run --nproc_per_node 2 engine_worker.py JOBS.json SECONDS

A job is {"name", "config", "overrides", "resume"}. What libraries know of its strategy is forgotten after it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pyfastlora.trainer import job
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.console import Console


def forget() -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        del os.environ[name]


def main(jobs: Path) -> None:
    for wanted in json.loads(jobs.read_text()):
        ended = ""
        try:
            loaded = load_config(wanted["config"], wanted["overrides"])
            job.train(loaded, Console(quiet=True), wanted["resume"])
        except Exception:
            ended = traceback.format_exc()
        jobs.with_name(f"{wanted['name']} {os.environ['RANK']}").write_text(ended)
        forget()
    dist.barrier()  # a process that leaves first takes the other's connection along
    dist.destroy_process_group()


if __name__ == "__main__":
    # processes that wait for each other would do so for good
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
    main(Path(sys.argv[1]))
