"""All that can be known about a job before its weights are loaded: findings, each with what to do about it.

A check looks at one subject and yields what it finds; a UserError that it raises is a finding, too. One that
needs what an earlier one could not get is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyfastlora import _jit
from pyfastlora.trainer.config import Config, DatasetKeys
from pyfastlora.trainer.config.load import LoadedConfig, load_config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import HubError, UserError
from pyfastlora.trainer.run_dir import RunDir

ROWS = 100  # of each dataset that are looked at
OPTIMIZER_STATES = 2  # of AdamW, beside the weights in a checkpoint


@dataclass(frozen=True)
class Finding:
    """error: the job would fail; warning: it would run, and probably not do what is wanted; note: a fact."""

    level: Literal["error", "warning", "note"]
    subject: str
    sentence: str


@dataclass
class Patient:
    """The job, and what the checks have learned about it."""

    config: Config
    model: Any = None  # on the meta device, with its adapter
    model_config: Any = None
    tokenizer: Any = None
    device: Any = None


_NOT_HERE = "is not on this machine, and the hub was not asked (HF_HUB_OFFLINE=0 does that): not checked"
Check = Callable[[Patient], Iterable[Finding]]


@dataclass
class Report:
    """Every finding, in order."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: nothing stands in the way; 1: it would run, with warnings; 2: it would fail."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if "warning" in levels else 0

    def say(self, console: Console) -> None:
        """Prints a line per finding, and how many there are."""
        styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
        for finding in self.findings:
            said = finding.sentence.startswith(finding.subject)  # as sentences about a key do
            subject = "" if said else f"{finding.subject}: "
            console.say(f"{finding.level:<8}{subject}{finding.sentence}", styles[finding.level])
        counts = [(level, sum(f.level == level for f in self.findings)) for level in ("error", "warning")]
        counted = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts)
        verdict = ("nothing stands in the way", "it would run", "it would fail")[self.exit_code]
        console.say(f"{counted}: {verdict}")


def examine(path: str, overrides: Iterable[str] = ()) -> Report:
    """Looks at the job of a YAML file. Raises nothing: what is wrong is found."""
    report = Report()
    try:
        loaded = load_config(path, overrides)
    except UserError as error:
        report.findings += [Finding("error", "keys", line) for line in str(error).splitlines()]
        return report
    patient = Patient(loaded.config)
    for subject, check in _checks(loaded):
        try:
            report.findings += check(patient)
        except UserError as error:
            report.findings.append(Finding("error", subject, str(error)))
    return report


def _checks(loaded: LoadedConfig) -> Iterator[tuple[str, Check]]:
    yield "keys", lambda patient: [Finding("note", "keys", note) for note in loaded.notes]
    yield "output_dir", _output
    yield "packages", _packages
    yield "machine", _machine
    yield "attention", _attention
    yield "base_model", _model
    yield "tokenizer", _tokenizer
    yield "adapter", _adapter
    yield "disk", _disk
    for section in ("datasets", "pretraining_dataset", "test_datasets"):
        for i, given in enumerate(getattr(loaded.config, section)):
            key = f"{section}[{i}]"
            entry = given.as_dataset() if section == "pretraining_dataset" else given
            yield key, functools.partial(_data, key=key, entry=entry)
    yield "test_datasets", _held_out


def _output(patient: Patient) -> Iterator[Finding]:
    RunDir(patient.config.output_dir).check()
    yield from ()


def _packages(patient: Patient) -> Iterator[Finding]:
    from importlib import metadata

    from pyfastlora.trainer.model import check_packages

    check_packages(patient.config)
    names = ("torch", "transformers", "peft", "bitsandbytes")
    found = [f"{n} {metadata.version(n)}" for n in names if importlib.util.find_spec(n) is not None]
    yield Finding("note", "packages", ", ".join(found))


def _machine(patient: Patient) -> Iterator[Finding]:
    from pyfastlora.ops import _native
    from pyfastlora.trainer.precision import device_of_run, has_fast_bf16, resolve_precision

    config, patient.device = patient.config, device_of_run()
    precision = resolve_precision(config, patient.device)
    yield Finding("note", "machine", f"{patient.device}, {os.cpu_count()} cores; {precision}")
    if config.bf16 is True and not has_fast_bf16(patient.device):
        sentence = f"bf16: true on {patient.device}, which emulates it slowly; bf16: auto takes float32 here"
        yield Finding("warning", "machine", sentence)
    compiler = _jit.find_compiler()
    if config.fastlora and config.adapter and not any(_jit.find(_native.recipe(), compiler)):
        made = (
            "compiled on first use, in some ten seconds" if compiler else "and no C++ compiler to make them"
        )
        yield Finding("note" if compiler else "warning", "machine", f"no compiled kernels yet, {made}")


def _attention(patient: Patient) -> Iterator[Finding]:
    config, wanted = patient.config, patient.config.attn_implementation or ""
    needs = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if package := needs.get(wanted):
        if patient.device is not None and patient.device.type == "cpu":
            yield Finding("error", "attention", f"{wanted} needs a GPU; say attn_implementation: sdpa")
        elif importlib.util.find_spec(package) is None:
            sentence = f"{wanted} needs the package {package}; install it, or say attn_implementation: sdpa"
            yield Finding("error", "attention", sentence)
    if config.sample_packing and wanted in ("", "sdpa", "eager") and config.sequence_len >= 8192:
        gigabytes = config.sequence_len**2 / 2**30
        sentence = (
            f"packed rows of {config.sequence_len} tokens make masks of {gigabytes:.1f} GiB each with "
            f"{wanted or 'sdpa'}; flash_attention_2 needs none"
        )
        yield Finding("warning", "attention", sentence)


def _model(patient: Patient) -> Iterator[Finding]:
    from transformers import AutoConfig

    from pyfastlora.trainer.model import check_base_model, first_line
    from pyfastlora.trainer.packing import LEAKY_FAMILIES

    config = patient.config
    check_base_model(config)
    try:
        found = AutoConfig.from_pretrained(
            os.path.expanduser(config.base_model),
            revision=config.revision_of_model,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # transformers raises what its files raise
        if not Path(os.path.expanduser(config.base_model)).exists():
            yield Finding("warning", "base_model", f"{config.base_model} {_NOT_HERE}")
            return
        raise UserError(f"its configuration cannot be read: {first_line(error)}") from error
    patient.model_config = found
    longest = getattr(found, "max_position_embeddings", None)
    if isinstance(longest, int) and config.sequence_len > longest:
        sentence = f"sequence_len: {config.sequence_len} is more than the {longest} positions it was made for"
        yield Finding("warning", "base_model", sentence)
    if config.sample_packing and found.model_type in LEAKY_FAMILIES:
        level: Literal["error", "warning"] = "error" if config.sample_packing is True else "warning"
        sentence = f"{found.model_type} does not keep packed samples apart: sample_packing: false"
        yield Finding(level, "base_model", sentence)


def _tokenizer(patient: Patient) -> Iterator[Finding]:
    from pyfastlora.trainer.model import load_tokenizer

    if patient.model_config is None and patient.config.tokenizer_config is None:
        return  # base_model, where the tokenizer is, was found missing
    patient.tokenizer = tokenizer = load_tokenizer(patient.config)
    if tokenizer.eos_token_id is None:
        sentence = "there is no EOS token, so that nothing learns to end: special_tokens: {eos_token: ..}"
        yield Finding("warning", "tokenizer", sentence)


def _adapter(patient: Patient) -> Iterator[Finding]:
    """On the meta device, where a model of any size takes no memory."""
    if patient.model_config is None or patient.tokenizer is None:
        return
    import torch
    from transformers import AutoModelForCausalLM

    from pyfastlora.trainer import model as models
    from pyfastlora.trainer.adapter import add_adapter
    from pyfastlora.trainer.job import libraries_quiet
    from pyfastlora.trainer.precision import Precision

    config = patient.config
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                patient.model_config, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # of a model's own code
        raise UserError(f"no model can be made of base_model: {models.first_line(error)}") from error
    if config.bits == 4 and patient.device is not None and patient.device.type == "cpu":
        models.check_4bit_widths(base, config.base_model)
    precision = Precision(torch.float32, None, torch.float32)
    with torch.device("meta"), libraries_quiet():
        patient.model = add_adapter(base, config, precision, patient.tokenizer)
    trained, total = models.count_parameters(patient.model)
    yield Finding(
        "note", "adapter", f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    )


def _disk(patient: Patient) -> Iterator[Finding]:
    if patient.model is None:
        return
    config = patient.config
    trained = sum(4 * p.numel() for p in patient.model.parameters() if p.requires_grad)
    kept = 0 if config.save_strategy == "no" else config.save_total_limit or max(1, round(config.num_epochs))
    needed = trained + kept * (1 + OPTIMIZER_STATES) * trained
    folder = Path(os.path.expanduser(config.output_dir)).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        sentence = (
            f"{kept} checkpoints and the result take about {needed / 2**30:.1f} GiB, {there} has "
            f"{free / 2**30:.1f} GiB left; set save_total_limit, or another output_dir"
        )
        yield Finding("error", "disk", sentence)


def _data(patient: Patient, key: str, entry: DatasetKeys) -> Iterator[Finding]:
    from pyfastlora.trainer.data.registry import prompt_type
    from pyfastlora.trainer.data.sources import read_rows
    from pyfastlora.trainer.data.tokenise import Counts, Rules, tokenise

    config, counts = patient.config, Counts()
    try:
        rows = list(itertools.islice(read_rows(entry, key, streaming=True), ROWS))
    except HubError:
        yield Finding("warning", key, f"{entry.path} {_NOT_HERE}")
        return
    if not rows:
        yield Finding("error", key, f"{entry.path} has no rows")
        return
    if patient.tokenizer is None:
        fields = ", ".join(map(str, rows[0].values)) if isinstance(rows[0].values, dict) else "no fields"
        yield Finding("note", key, f"{entry.path} has rows with {fields}; no tokenizer to look further")
        return
    kind = prompt_type(config.with_template(entry), patient.tokenizer)
    rules = dataclasses.replace(Rules.of(config), excess_length_strategy="truncate")
    for _ in tokenise(rows, kind, patient.tokenizer, rules, counts):
        pass
    seen = f"of the first {counts.rows} rows of {entry.path}"
    if not counts.samples:
        yield Finding("error", key, f"none {seen} has a token to train on")
    else:
        share = counts.trained_tokens / counts.tokens
        yield Finding("note", key, f"{seen}, {counts.samples} samples, {share:.0%} of the tokens trained on")
    if counts.truncated:
        fate = {"drop": "dropped", "truncate": "cut", "raise": "an error"}[config.excess_length_strategy]
        level: Literal["error", "warning"] = "error" if fate == "an error" else "warning"
        longest = f"sequence_len: {config.sequence_len} (the longest has {counts.longest} tokens)"
        yield Finding(level, key, f"{counts.truncated} {seen} are longer than {longest} and {fate}")
    for count, why in ((counts.bad_rows, counts.first_bad), (counts.dropped_untrained, "")):
        if count and counts.samples:
            what = f"do not fit their type, the first: {why}" if why else "have nothing to train on"
            yield Finding("warning", key, f"{count} {seen} {what}")


def _held_out(patient: Patient) -> Iterator[Finding]:
    config = patient.config
    trained = {(d.path, str(d.data_files), d.split): f"datasets[{i}]" for i, d in enumerate(config.datasets)}
    for i, entry in enumerate(config.test_datasets):
        if same := trained.get((entry.path, str(entry.data_files), entry.split)):
            sentence = f"is {same} as well: what is held out would be trained on"
            yield Finding("warning", f"test_datasets[{i}]", sentence)
