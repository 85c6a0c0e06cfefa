"""Signals to a run: SIGUSR1 saves a checkpoint; SIGTERM and SIGINT save one and stop, a second one at once.

Nothing is done where the signal arrives, in the middle of a step, but at the end of the step, and by all
processes in the same one.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyfastlora.trainer.processes import LAUNCHED, Processes

SAVE, STOP = 1, 2


class Signals(TrainerCallback):
    """Hears signals inside a with block, and acts on them as a callback of Trainer."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._asked = 0
        self._group: Any = None
        self._before: dict[int, Any] = {}
        self.stopped = False

    def __enter__(self) -> Signals:
        stops = {signal.SIGINT} if LAUNCHED in os.environ else {signal.SIGINT, signal.SIGTERM}
        for number in (*stops, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._asked = max(self._asked, SAVE)
            return
        if self._asked == STOP or self.stopped:
            raise KeyboardInterrupt
        self._asked = STOP

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked, self._asked = self._agreed(), 0
        if asked:
            control.should_save = True
        if asked == STOP:
            self.stopped = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:  # Trainer takes a stop for the end of the epoch
            control.should_save = control.should_evaluate = False

    def _agreed(self) -> int:
        """The most that any process was asked for."""
        if self._processes.count == 1:
            return self._asked
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # a GPU's queue is not waited for
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return int(asked)
