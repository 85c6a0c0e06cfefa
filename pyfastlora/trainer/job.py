"""One training job, from a configuration to a saved adapter or model.

The order matters: everything that can be wrong is looked at before anything is written. Configuration and
output folder first (milliseconds), then packages and the model's files, then the data, then the weights;
the run directory appears when training can start.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.checkpoints import clean, step_of
from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import ConfigError, StoppedError, UserError
from pyfastlora.trainer.loggers import told
from pyfastlora.trainer.processes import Processes, join
from pyfastlora.trainer.progress import Progress
from pyfastlora.trainer.report import reported
from pyfastlora.trainer.resume import find
from pyfastlora.trainer.run_dir import NoRunDir, RunDir

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from pyfastlora import PatchReport
    from pyfastlora.trainer.config import Config
    from pyfastlora.trainer.data.prepare import PreparedData


@dataclass(frozen=True)
class Result:
    """What a job did. The loss is the mean per trained token; kernels is the report, None for plain PEFT."""

    run_dir: RunDir
    steps: int
    held_out_loss: float | None
    tokens_per_second: float
    kernels: dict[str, Any] | None


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or (None) at step 0. anyway: also at one of a run that differs."""

    may_resume: bool
    checkpoint: Path | None
    anyway: bool


def train(
    loaded: LoadedConfig, console: Console, resume: str | None = None, resume_anyway: bool = False
) -> Result:
    """Runs the job, as one of its processes. Raises UserError for whatever the user can put right.

    resume: auto, never or a checkpoint, before what the configuration says.
    """
    processes = join()
    if not processes.is_first:
        console = Console(quiet=True)
    config = loaded.config
    wanted = resume or config.resume_from_checkpoint
    wanted = wanted or ("auto" if config.auto_resume_from_checkpoints else "never")
    run_dir = RunDir(config.output_dir)
    start = Start(wanted != "never", find(run_dir.path, wanted), resume_anyway)
    if processes.is_first:
        run_dir.check(start.may_resume)
        clean(run_dir.path)
    for note in loaded.notes:
        console.say(f"note: {note}")
    return run(loaded, run_dir, console, processes, start)


def run(
    loaded: LoadedConfig,
    run_dir: RunDir,
    console: Console,
    processes: Processes,
    start: Start,
    choose: Callable[[PreparedData, Config], PreparedData] | None = None,
) -> Result:
    """The job in a folder that is known to be good, with what `choose` leaves of the data."""
    from pyfastlora.trainer.out_of_memory import out_of_memory_explained

    with (
        libraries_quiet(),
        told(loaded.config),
        _backend_requests_checked(),
        out_of_memory_explained(loaded.config, processes),
        reported(run_dir if processes.is_first else NoRunDir(run_dir.path), console),
    ):
        return _run(loaded, run_dir, console, processes, start, choose)


def _run(
    loaded: LoadedConfig,
    run_dir: RunDir,
    console: Console,
    processes: Processes,
    start: Start,
    choose: Callable[[PreparedData, Config], PreparedData] | None,
) -> Result:
    import torch
    from transformers import set_seed

    import pyfastlora
    from pyfastlora.trainer import model as models
    from pyfastlora.trainer.adapter import add_adapter
    from pyfastlora.trainer.attention import check_attention
    from pyfastlora.trainer.data.prepare import prepare
    from pyfastlora.trainer.memory import Meter
    from pyfastlora.trainer.model_card import users_own, write_card
    from pyfastlora.trainer.planning import RunMemory
    from pyfastlora.trainer.precision import device_of_run, resolve_precision
    from pyfastlora.trainer.resume import check, fingerprint
    from pyfastlora.trainer.samples import Samples
    from pyfastlora.trainer.signals import Signals
    from pyfastlora.trainer.stacked import stack
    from pyfastlora.trainer.strategy import resolve
    from pyfastlora.trainer.training import make_trainer

    config = loaded.config
    device = device_of_run(processes.local_rank)
    precision = resolve_precision(config, device)
    models.check_packages(config)
    models.check_base_model(config)
    check_attention(config, device, precision)
    tokenizer = models.load_tokenizer(config)
    with console.bar("tokenising", None, "rows") as bar:
        data = prepare(config, tokenizer, bar.update)
    for line in data.lines():
        console.say(line)
    strategy = resolve(config, processes, device.type)
    current = fingerprint(config, data.contents, strategy.name, processes.count, device.type)
    checkpoint = start.checkpoint
    changes = [] if checkpoint is None else check(checkpoint, current, start.anyway)
    samples = Samples.of(config, data.held_out, tokenizer, strategy, processes, console)
    memory = RunMemory.of(config, tokenizer, data.train, strategy.name, processes)
    console.say(memory.line)

    set_seed(config.seed)  # before the adapter draws its A
    # shards of a model that no GPU could hold are made from CPU memory
    whole_on_cpu = strategy.divides_weights and config.bits is None
    base = models.load_base(config, precision, torch.device("cpu") if whole_on_cpu else device)
    model = add_adapter(base, config, precision, tokenizer, resumes=checkpoint is not None)
    trained, total = models.count_parameters(model)
    console.say(f"{config.base_model}: {trained:,} of {total:,} parameters trained ({trained / total:.2%})")
    console.say(f"{device}, {strategy}, {precision}")
    samples.ask(model, precision, "before")  # of whom the kernel report is not to tell
    report = pyfastlora.patch(model) if config.adapter and config.fastlora else None
    if config.adapter:
        console.say(_before_training(report))

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if config.sample_packing and _keeps_apart(model, config, pad_id, device, console):
        data = _packed(data, config, console)
    if choose is not None:
        data = choose(data, config)

    if not processes.is_first:
        run_dir = NoRunDir(config.output_dir)
    progress = Progress(run_dir, console)
    signals = Signals(processes)
    trainer = make_trainer(
        *(model, data, config, precision, device, pad_id, progress),
        *(processes, strategy, current, signals),
    )
    trainer.check()
    run_dir.create(loaded, start.may_resume)
    kernels = _save_kernels(run_dir, report)
    run_dir.write_json("data.json", data.report)
    run_dir.write_json("plan.json", memory.to_dict())
    run_dir.write_json("strategy.json", dataclasses.asdict(strategy))
    if checkpoint is not None:
        run_dir.cut_log(step_of(checkpoint))
        values = {"step": step_of(checkpoint), "checkpoint": str(checkpoint), "changed": changes}
        run_dir.log("resume", values)
        console.say(f"going on from {checkpoint}" + "".join(f"; {change}" for change in changes))
    else:
        run_dir.cut_log(-1)  # of a start that came to no checkpoint
        values = {"base_model": config.base_model, "trained_parameters": trained, "device": str(device)}
        run_dir.log("start", values)
    samples.save(run_dir)
    trainer.meter = Meter(model, device)
    started = time.perf_counter()
    with progress.shown(), signals:
        trainer.run(checkpoint)
        if signals.stopped:
            raise StoppedError(
                f"stopped after step {trainer.state.global_step}, with a checkpoint; --resume auto goes on"
            )
        patience = config.early_stopping_patience
        if patience is not None and trainer.state.global_step < trainer.state.max_steps:
            at = trainer.state.global_step
            console.say(f"stopped after step {at}: no lower held-out loss in {patience} evaluations")
        if data.held_out is not None and trainer.held_out_loss is None:
            trainer.evaluate()
    if config.pretraining_dataset:  # what was read is known now
        run_dir.write_json("data.json", data.report)
        for line in data.counted():
            console.say(line)
    run_dir.write_json("plan.json", memory.to_dict(trainer.meter.peak(trainer.optimizer)))
    console.say(memory.line)
    users_card = users_own(run_dir.path)
    best = trainer.best() if config.load_best_model_at_end else None
    if best is None:
        trainer.save_model(str(run_dir.path))
    else:
        console.say(f"the lowest held-out loss was that of {best.name}, which is the result")
        run_dir.copy_result(best)
    if processes.is_first and trainer.earlier is not None:
        stack(run_dir.path)
    if processes.is_first:
        tokenizer.save_pretrained(str(run_dir.path))
    if report is not None:
        report = pyfastlora.report(model)  # with the groups that were found, and the calls of the run
        kernels = _save_kernels(run_dir, report)
        console.say(str(report))
    samples.ask(model, precision, "after")
    samples.save(run_dir, trainer.state.global_step)
    result = Result(
        run_dir, trainer.state.global_step, trainer.held_out_loss, progress.tokens_per_second, kernels
    )
    end = {"step": result.steps, "seconds": round(time.perf_counter() - started, 2)}
    run_dir.log("end", end if best is None else end | {"weights_of": best.name})
    write_card(run_dir, users_card)
    what = "adapter" if config.adapter else "model"
    console.say(
        f"{result.steps} steps, {result.tokens_per_second:.0f} tokens/s; {what} saved in {run_dir.path}"
    )
    return result


def _keeps_apart(
    model: PeftModel | PreTrainedModel,
    config: Config,
    pad_id: int,
    device: torch.device,
    console: Console,
) -> bool:
    """Whether the model can be trained on packed rows.

    Raises UserError where that was demanded and it cannot.
    """
    from pyfastlora.trainer import model as models
    from pyfastlora.trainer.packing import LEAKS, leak
    from pyfastlora.trainer.training import collator_of

    vocabulary = models.vocabulary_of(model)
    found = leak(model, collator_of(config, pad_id).packed, vocabulary, device)
    if found <= LEAKS:
        return True
    sentence = (
        f"a document changes with the one before it in its row (by {found:.2g} of the logits' spread): "
        f"{model.config.model_type} does not keep packed samples apart"
    )
    if config.sample_packing is True:
        raise UserError(f"sample_packing: {sentence}; set it to auto or false")
    console.say(f"not packed: {sentence}")
    return False


def _packed(data: PreparedData, config: Config, console: Console) -> PreparedData:
    from pyfastlora.trainer.data.stream import Stream
    from pyfastlora.trainer.packing import PackedRows

    held_out = data.held_out
    if held_out is not None and config.eval_sample_packing is not False:
        held_out = PackedRows.of(held_out, config, config.seed)
    if isinstance(data.train, Stream):
        console.say(f"packed: {config.streaming_multipack_buffer_size} samples at a time")
        data.train.packed = True
        return dataclasses.replace(data, held_out=held_out)
    train = PackedRows.of(data.train, config, config.seed)
    console.say(f"packed: {train.packing}")
    return dataclasses.replace(data, train=train, held_out=held_out, packing=train.packing)


def _before_training(report: PatchReport | None) -> str:
    if report is None:
        return "fastlora: false: every module runs PEFT's forward"
    return report.summary() if report.fused == report.total else str(report)


def _save_kernels(run_dir: RunDir, report: PatchReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    kernels = report.to_dict()
    run_dir.write_json("kernels.json", kernels)
    run_dir.write_text("kernels.txt", f"{report}\n")
    return kernels


@contextmanager
def _backend_requests_checked() -> Iterator[None]:
    """A backend that was asked for and cannot be had is the user's to put right, not a bug."""
    try:
        from pyfastlora.ops._registry import BackendError
    except ValueError as error:  # the variable is read on import
        raise ConfigError(f"FASTLORA_BACKEND: {error}") from error
    try:
        yield
    except BackendError as error:
        raise UserError(str(error)) from error


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Keeps bars and warnings of transformers and datasets out of the output; errors still come through."""
    bnb_log = logging.getLogger("bitsandbytes")
    bnb_level = bnb_log.level
    bnb_log.setLevel(logging.ERROR)  # before what imports it, which warns of kernels that it could download
    import datasets
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    no_datasets_bars = datasets.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.set_verbosity(verbosity)
        bnb_log.setLevel(bnb_level)
        if bars:
            log.enable_progress_bar()
        if not no_datasets_bars:
            datasets.enable_progress_bars()
