"""transformers' Trainer, set up from a configuration: the only file that knows Trainer's insides.

What differs from Trainer as it comes: evaluation averages the loss over tokens (Trainer averages over
batches), every logged step is a whole record (record.py), a loss that is not finite stops the run
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
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    IntervalStrategy,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pyfastlora.trainer import loggers
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.data.even_share import EvenShare
from pyfastlora.trainer.data.prepare import PreparedData
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.memory import Meter
from pyfastlora.trainer.optimizers import check_steps, groups_of, has_groups, with_arguments
from pyfastlora.trainer.packing import Collator, PackedCollator
from pyfastlora.trainer.precision import Precision
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.record import Recorder
from pyfastlora.trainer.relora import Restarts, with_restarts
from pyfastlora.trainer.saving import SavingTrainer
from pyfastlora.trainer.schedules import is_ours, make_schedule
from pyfastlora.trainer.signals import Signals
from pyfastlora.trainer.stacked import Earlier
from pyfastlora.trainer.strategy import Strategy
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
    processes: Processes,
    strategy: Strategy,
    fingerprint: dict[str, Any],
    signals: Signals,
) -> FastloraTrainer:
    """A trainer ready for `.train()`; `model` is on `device` already."""
    trainer = FastloraTrainer(
        model=model,
        strategy=strategy,
        fsdp=config.fsdp_config,
        args=_arguments(config, precision, device, strategy, data.train_rows, data.held_out is not None),
        data_collator=collator_of(config, pad_id),
        train_dataset=data.train,
        eval_dataset=data.held_out,
    )
    trainer.config = config
    trainer.listener, trainer.processes, trainer.fingerprint = listener, processes, fingerprint
    trainer.earlier = Earlier(model) if config.changes_base else None  # type: ignore[arg-type]
    trainer.keep = config.save_total_limit
    trainer.watch = Watch(data.train, config, Path(config.output_dir).expanduser())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps(trainer))
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if config.relora and trainer.earlier is not None:
        trainer.add_callback(Restarts(config, trainer.earlier))
    trainer.add_callback(signals)  # hears of a step's end after all others
    return trainer


def collator_of(config: Config, pad_id: int) -> Collator:
    """What makes batches of rows."""
    pad_to = config.sequence_len if config.pad_to_sequence_len else None
    flat = (config.attn_implementation or "").startswith("flash")
    return Collator(PaddingCollator(pad_id, pad_to), PackedCollator(pad_id, pad_to, flat))


class FastloraTrainer(SavingTrainer):
    """Trainer with token counts, token-weighted evaluation, checkpoints that are whole, and a Listener."""

    config: Config
    listener: Listener
    watch: Watch
    meter: Meter | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorder = Recorder(self.args.device)
        self.resumed_from: Path | None = None

    def run(self, checkpoint: Path | None) -> None:
        """Trains, from a checkpoint on where one is given."""
        self.resumed_from = checkpoint
        if checkpoint is not None:
            self.args.eval_on_start = False
        if self.earlier is not None:
            if checkpoint is not None:
                self.earlier.read(checkpoint)
            elif self.config.init_of_base is not None:
                self.earlier.begin(self.config.init_of_base)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    @property
    def held_out_loss(self) -> float | None:
        """Of the model as it is now; None where it has not been evaluated since its last step."""
        now = (e for e in self.state.log_history if e["step"] == self.state.global_step and "eval_loss" in e)
        return next((entry["eval_loss"] for entry in now), None)

    def check(self) -> None:
        """Raises ConfigError for what an optimizer or a schedule would not take, before a run begins."""
        model: Any = self.model
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        check_steps(model, kind, with_arguments(kind, arguments, self.config), self.config)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trained: Any = self.model if model is None else model
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            arguments = with_arguments(kind, arguments, self.config)
            if has_groups(self.config):
                arguments["params"] = groups_of(trained, self.config, self.get_decay_parameter_names(trained))
            self.optimizer_cls_and_kwargs = kind, arguments
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and is_ours(self.config):
            warmup = self.args.get_warmup_steps(num_training_steps)
            held: Any = optimizer or self.optimizer
            self.lr_scheduler = make_schedule(self.config, held, warmup, num_training_steps)
            self._created_lr_scheduler = True
        schedule: Any = super().create_scheduler(num_training_steps, optimizer)
        return with_restarts(schedule, self.config) if self.config.relora else schedule

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
        """The mean loss per trained token of the held-out data; it draws no random numbers from training."""
        start = time.perf_counter()
        assert self.model is not None
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        share = EvenShare(eval_dataset or self.eval_dataset, self.processes.rank, self.processes.count)
        with torch.no_grad(), torch.random.fork_rng(self._gpus()):
            for batch in DataLoader(
                share,
                self.args.eval_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            ):
                inputs = self._prepare_inputs(batch)
                inputs.pop("tokens")
                tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
                loss = model(**inputs).loss.double() * tokens
                totals += torch.stack([loss.where(tokens > 0, 0.0), tokens.double()])
        loss, tokens = self.accelerator.reduce(totals, "sum").tolist()
        seconds = time.perf_counter() - start
        self.recorder.evaluated(self.state.global_step, seconds)
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
            logs |= self.recorder.record(self.state, *self._counted())
        super().log(logs, start_time)
        if event is not None:
            self.listener.logged(event, {"step": self.state.global_step, **logs})
        if event == "train" and (spike := self.watch.logged(self.state.global_step, logs["loss"])):
            self.listener.logged("spike", spike)

    def learn_groups(self) -> None:
        """One forward in each mode, after which the groups of patched linears are known.

        Else the first step of a run that goes on would be computed without them, and rounded otherwise.
        """
        model = self.model_wrapped
        tokens = torch.arange(8, device=self.args.device).reshape(1, -1)
        with torch.no_grad(), torch.random.fork_rng(self._gpus()):
            for training in (False, True):
                model.train(training)
                model(input_ids=tokens, use_cache=False)

    def _gpus(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    def _counted(self) -> list[int]:
        """Tokens and trained tokens of all processes since the last call."""
        counts: list[int] = self.accelerator.reduce(self._counts, "sum").tolist()
        self._counts.zero_()
        return counts


class _Steps(TrainerCallback):
    def __init__(self, trainer: FastloraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        trainer.learn_groups()
        if trainer.resumed_from is not None:
            trainer.restore_since_log(trainer.resumed_from)
        elif trainer.processes.rank:
            torch.manual_seed(args.seed + trainer.processes.rank)  # else all drop the same values
        trainer.listener.started(state.max_steps)
        trainer.listener.stepped(state.global_step)
        trainer.recorder.start(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch or 0):
            control.should_evaluate = True  # now, so that a checkpoint of this step is behind it
        self._trainer.listener.stepped(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.held_out_loss is not None:
            control.should_evaluate = False


def _arguments(
    c: Config, precision: Precision, device: torch.device, strategy: Strategy, rows: int, evaluates: bool
) -> TrainingArguments:
    batches = math.ceil(rows / (c.micro_batch_size * strategy.processes))
    steps_per_epoch = math.ceil(batches / c.gradient_accumulation_steps)
    on_gpu = device.type == "cuda"
    compiles = on_gpu if c.torch_compile == "auto" else c.torch_compile
    deepspeed = None if strategy.deepspeed is None else dict(strategy.deepspeed)
    autocast = precision.autocast
    if deepspeed is not None and autocast is not None:
        deepspeed["torch_autocast"] = {"enabled": True, "dtype": str(autocast).removeprefix("torch.")}
        autocast = None  # Trainer would have DeepSpeed train 16-bit copies
    arguments = TrainingArguments(
        output_dir=c.output_dir,
        per_device_train_batch_size=c.micro_batch_size,
        per_device_eval_batch_size=c.eval_batch_size or c.micro_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        num_train_epochs=c.num_epochs,
        max_steps=c.max_steps or -1,
        learning_rate=c.learning_rate,
        lr_scheduler_type="constant" if is_ours(c) else c.lr_scheduler,
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
        bf16=autocast == torch.bfloat16,
        fp16=autocast == torch.float16,
        tf32=(c.tf32 if c.tf32 != "auto" else torch.cuda.get_device_capability(device) >= (8, 0))
        if on_gpu
        else None,
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu or strategy.processes == 1 else "gloo",
        ddp_find_unused_parameters=c.ddp_find_unused_parameters,
        ddp_bucket_cap_mb=c.ddp_bucket_cap_mb,
        ddp_broadcast_buffers=c.ddp_broadcast_buffers,
        ddp_timeout=c.ddp_timeout or 1800,
        deepspeed=deepspeed,
        activation_checkpointing=c.gradient_checkpointing,  # its name since transformers 5
        activation_checkpointing_kwargs=c.gradient_checkpointing_kwargs.model_dump(),
        torch_compile=compiles,
        torch_compile_backend=c.torch_compile_backend if compiles else None,
        torch_compile_mode=c.torch_compile_mode if compiles else None,
        train_sampling_strategy=c.sampling,
        dataloader_num_workers=c.dataloader_num_workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # a stream's batches hold more than tensors
        logging_steps=c.logging_steps,
        logging_nan_inf_filter=False,  # would replace a nan by the mean of the losses before it
        eval_on_start=c.eval_on_start,
        seed=c.seed,
        restore_callback_states_from_checkpoint=c.early_stopping_patience is not None,
        disable_tqdm=True,
        **loggers.arguments(c),
        metric_for_best_model="loss" if evaluates else None,
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
    if strategy == "best":
        return {"save_strategy": "best"}
    if steps is None and per_epoch is None:
        return {f"{what}_strategy": "epoch"}
    return {
        f"{what}_strategy": "steps",
        f"{what}_steps": steps or max(1, steps_per_epoch // (per_epoch or 1)),
    }
