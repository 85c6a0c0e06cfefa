"""transformers' Trainer, set up from a configuration: the only file that knows Trainer's insides.

What differs from Trainer as it comes: evaluation averages the loss over tokens (Trainer averages over
batches), every logged step carries token counts and throughput, a loss that is not finite stops the run
(watch.py), and everything logged goes to a Listener instead of to Trainer's printers.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.data.prepare import PreparedData
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.memory import Meter
from pyfastlora.trainer.packing import Collator, PackedCollator
from pyfastlora.trainer.precision import Precision
from pyfastlora.trainer.watch import Watch, per_token


class Listener(Protocol):
    """Hears what happens during training; steps count optimizer steps."""

    def started(self, total_steps: int) -> None: ...

    def stepped(self, step: int) -> None: ...

    def logged(self, event: str, values: dict[str, Any]) -> None:
        """event is `train` (every logging_steps), `eval` (after every evaluation) or `spike` (a loss)."""


def make_trainer(
    model: PeftModel | PreTrainedModel,
    data: PreparedData,
    config: Config,
    precision: Precision,
    device: torch.device,
    pad_id: int,
    listener: Listener,
) -> FastloraTrainer:
    """A trainer ready for `.train()`; `model` is on `device` already."""
    trainer = FastloraTrainer(
        model=model,
        args=_arguments(config, precision, device, data.train_rows, data.held_out is not None),
        data_collator=collator_of(config, pad_id),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        callbacks=[_Steps(listener)],
    )
    trainer.listener = listener
    trainer.watch = Watch(data.train, config, Path(config.output_dir).expanduser())
    trainer.remove_callback(PrinterCallback)
    return trainer


def collator_of(config: Config, pad_id: int) -> Collator:
    """What makes batches of rows."""
    pad_to = config.sequence_len if config.pad_to_sequence_len else None
    flat = (config.attn_implementation or "").startswith("flash")
    return Collator(PaddingCollator(pad_id, pad_to), PackedCollator(pad_id, pad_to, flat))


class FastloraTrainer(Trainer):
    """Trainer with token counts, token-weighted evaluation and a Listener."""

    listener: Listener
    watch: Watch
    meter: Meter | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)  # tokens, trained tokens
        self._since = time.perf_counter()
        self._evaluating = 0.0
        self.evaluated_at = -1

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        counted = (inputs.pop("tokens"), (inputs["labels"][:, 1:] != IGNORED).sum())
        self._counts += torch.stack([count.to(self._counts.device) for count in counted])
        metered = self.meter.watching(inputs["input_ids"].numel()) if self.meter else contextlib.nullcontext()
        with metered:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.saw(self.state.global_step + 1, inputs, per_token(loss, counted[1], num_items_in_batch))
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss per trained token of the held-out data."""
        start = time.perf_counter()
        assert self.model is not None
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                inputs.pop("tokens")
                tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
                totals += torch.stack([self.model(**inputs).loss.double() * tokens, tokens.double()])
        loss, tokens = self.accelerator.reduce(totals, "sum").tolist()
        seconds = time.perf_counter() - start
        self._evaluating += seconds
        self.evaluated_at = self.state.global_step
        metrics = {
            f"{metric_key_prefix}_loss": loss / tokens,
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_seconds": round(seconds, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        event = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if event == "train":
            logs |= self._throughput()
        super().log(logs, start_time)
        if event is not None:
            self.listener.logged(event, {"step": self.state.global_step, **logs})
        if event == "train" and (spike := self.watch.logged(self.state.global_step, logs["loss"])):
            self.listener.logged("spike", spike)

    def _throughput(self) -> dict[str, Any]:
        """Counts since the last call; the time of evaluations in between is left out."""
        now = time.perf_counter()
        seconds = now - self._since - self._evaluating
        tokens, trained = self._counts.tolist()
        self._counts.zero_()
        self._since, self._evaluating = now, 0.0
        return {
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }

    def restart_clock(self) -> None:
        """Throughput counts from here."""
        self._since, self._evaluating = time.perf_counter(), 0.0


class _Steps(TrainerCallback):
    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._listener.started(state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._listener.stepped(state.global_step)


def _arguments(
    c: Config, precision: Precision, device: torch.device, rows: int, evaluates: bool
) -> TrainingArguments:
    steps_per_epoch = math.ceil(math.ceil(rows / c.micro_batch_size) / c.gradient_accumulation_steps)
    on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=c.output_dir,
        per_device_train_batch_size=c.micro_batch_size,
        per_device_eval_batch_size=c.eval_batch_size or c.micro_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        num_train_epochs=c.num_epochs,
        max_steps=c.max_steps or -1,
        learning_rate=c.learning_rate,
        lr_scheduler_type=c.lr_scheduler,
        lr_scheduler_kwargs=c.lr_scheduler_kwargs,
        warmup_steps=c.warmup_steps
        if c.warmup_steps is not None
        else c.warmup_ratio or 0,  # below 1: a share
        optim=c.optimizer,
        weight_decay=c.weight_decay,
        adam_beta1=c.adam_beta1,
        adam_beta2=c.adam_beta2,
        adam_epsilon=c.adam_epsilon,
        max_grad_norm=c.max_grad_norm,
        neftune_noise_alpha=c.neftune_noise_alpha,
        bf16=precision.autocast == torch.bfloat16,
        fp16=precision.autocast == torch.float16,
        tf32=(c.tf32 if c.tf32 != "auto" else torch.cuda.get_device_capability(device) >= (8, 0))
        if on_gpu
        else None,
        use_cpu=not on_gpu,
        activation_checkpointing=c.gradient_checkpointing,  # its name since transformers 5
        activation_checkpointing_kwargs=c.gradient_checkpointing_kwargs.model_dump(),
        train_sampling_strategy=c.sampling,
        dataloader_num_workers=c.dataloader_num_workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # a stream's batches hold more than tensors
        logging_steps=c.logging_steps,
        logging_nan_inf_filter=False,  # would replace a nan by the mean of the losses before it
        eval_on_start=c.eval_on_start,
        seed=c.seed,
        disable_tqdm=True,
        report_to="none",
        save_total_limit=c.save_total_limit,
        **_when("eval", c.eval_strategy, c.eval_steps, c.evals_per_epoch, steps_per_epoch, evaluates),
        **_when("save", c.save_strategy, c.save_steps, c.saves_per_epoch, steps_per_epoch, True),
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # else Trainer wraps the model in DataParallel on a machine with several
    return arguments


def _when(
    what: str,
    strategy: str | None,
    steps: int | None,
    per_epoch: int | None,
    steps_per_epoch: int,
    wanted: bool,
) -> dict[str, Any]:
    if not wanted or strategy == "no":
        return {f"{what}_strategy": "no"}
    if steps is None and per_epoch is None:
        return {f"{what}_strategy": "epoch"}
    return {
        f"{what}_strategy": "steps",
        f"{what}_steps": steps or max(1, steps_per_epoch // (per_epoch or 1)),
    }
