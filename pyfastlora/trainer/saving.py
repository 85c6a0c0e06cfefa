"""What Trainer saves and takes up again: checkpoints that are whole, with all it takes to go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from pyfastlora.trainer import model as models
from pyfastlora.trainer.checkpoints import rotate, writing
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.resume import STATE, read_state


class SavingTrainer(Trainer):
    """Trainer whose checkpoints are written by checkpoints.py and guarded by resume.py."""

    processes: Processes
    fingerprint: dict[str, Any]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # tokens and trained tokens since the last logged step
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        run_dir, state = Path(self.args.output_dir or "."), self.state
        self.store_flos()
        best = run_dir / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        since_log = self._since_log()
        with writing(run_dir, state.global_step, self.processes.is_first, self.processes.barrier) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.processes.is_first:
                for callback in (*self.callback_handler.callbacks, self.control):
                    if isinstance(callback, ExportableState):
                        held: Any = state.stateful_callbacks
                        held[type(callback).__name__] = callback.state()
                there = best is not None and (best.is_dir() or state.best_global_step == state.global_step)
                state.best_model_checkpoint = str(best) if there else None
                state.save_to_json(str(folder / TRAINER_STATE_NAME))
                ours = {"fingerprint": self.fingerprint, "since_log": since_log}
                (folder / STATE).write_text(json.dumps(ours, indent=2), encoding="utf-8")
        if self.processes.is_first:
            rotate(run_dir, self.args.save_total_limit, best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter in PEFT's format, or the whole model, by the first process."""
        assert output_dir is not None and self.model is not None
        if self.processes.is_first:
            models.save(self.accelerator.unwrap_model(self.model), Path(output_dir))

    def _since_log(self) -> dict[str, Any]:
        """What the next line of the log will hold from before a checkpoint; a list per process."""
        loss = self.accelerator.gather(self._tr_loss.reshape(1).double())
        counts = self.accelerator.gather(self._counts.reshape(1, -1))
        return {
            "loss": loss.tolist(),
            "counts": counts.tolist(),
            "logged_step": self._globalstep_last_logged,
        }

    def restore_since_log(self, checkpoint: Path) -> None:
        """Takes up what was counted before the checkpoint and after its last logged step."""
        held, rank = read_state(checkpoint)["since_log"], self.processes.rank
        self._tr_loss += held["loss"][rank]
        self._counts += torch.tensor(held["counts"][rank], device=self._counts.device)
        self._globalstep_last_logged = held["logged_step"]
