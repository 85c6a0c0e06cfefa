"""What Trainer saves and takes up again: checkpoints that are whole, with all it takes to go on exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from pyfastlora.trainer import model as models
from pyfastlora.trainer.checkpoints import rotate, writing
from pyfastlora.trainer.config.engine import FsdpKeys
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.resume import STATE, read_state
from pyfastlora.trainer.sharding import load_optimizer, save_optimizer, shard, whole_model
from pyfastlora.trainer.stacked import Earlier
from pyfastlora.trainer.strategy import Strategy


class SavingTrainer(Trainer):
    """Trainer whose checkpoints are written by checkpoints.py and guarded by resume.py."""

    processes: Processes
    fingerprint: dict[str, Any]
    earlier: Earlier | None = None  # what the base has taken in, where it changes
    keep: int | None = None  # checkpoints; Trainer's own limit of 1 deletes the last one at the end

    def __init__(self, strategy: Strategy, fsdp: FsdpKeys, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strategy, self.fsdp = strategy, fsdp
        # the model places itself and averages its gradients: accelerate then leaves it alone
        self.is_distributed_loading_by_transformers = strategy.is_fsdp2
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
            rotate(run_dir, self.keep, best)

    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, where there is one and it is not the end."""
        step = self.state.best_global_step
        best = Path(self.args.output_dir or ".") / f"checkpoint-{step}"
        return best if step and step != self.state.global_step and best.is_dir() else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter in PEFT's format, or the whole model, by the first process; all have to call it.

        With a base that has changed, `stack` makes of it an adapter for the base as it was.
        """
        assert output_dir is not None and self.model is not None
        model = self.accelerator.unwrap_model(self.model)
        state = None
        if self.strategy.is_fsdp2:
            state = whole_model(model, trained_only=isinstance(model, PeftModel))
        elif self.strategy.divides_weights:
            engine: Any = self.model_wrapped
            state = engine._zero3_consolidated_16bit_state_dict(isinstance(model, PeftModel))
        if self.processes.is_first:
            models.save(model, Path(output_dir), state)
            if self.earlier is not None:
                self.earlier.write(Path(output_dir))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.strategy.is_fsdp2:
            model: Any = self.model
            shard(model, self.fsdp, self.args.device, self.processes.count, self.strategy.offloads)
            model._is_fsdp_managed_module = True  # what Trainer and generation go by
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """While gradients are accumulated: Trainer's asks a model that transformers has sharded."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.strategy.is_fsdp2:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._stepped()
        save_optimizer(self.model, optimizer, Path(output_dir, OPTIMIZER_NAME), self.processes.is_first)
        if self.processes.is_first:
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.strategy.is_fsdp2 or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = self._stepped()
        load_optimizer(self.model, optimizer, Path(checkpoint, OPTIMIZER_NAME))
        scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _stepped(self) -> tuple[Any, Any]:
        """torch's own optimizer, out of accelerate's, and the schedule."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer, self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing for a run that was killed behind its last step: Trainer would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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
