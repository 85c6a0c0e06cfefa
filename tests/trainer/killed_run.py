"""A run in a process of its own, made to be killed; importing this is most of its start."""

from __future__ import annotations

import os

import torch

from pyfastlora.trainer import job, training  # noqa: F401  (the second is what takes long to import)
from pyfastlora.trainer.config.load import load_config
from pyfastlora.trainer.console import Console


def run(config: str, overrides: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    job.train(load_config(config, overrides), Console(quiet=True), "auto")
