"""The data of a configuration, prepared and looked at, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.job import libraries_quiet
from pyfastlora.trainer.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.data.prepare import PreparedData


def preprocess(loaded: LoadedConfig, console: Console, show: int = 0, folder: str | None = None) -> None:
    """Prepares the data, says what it is like, prints `show` samples, and writes a report to a new folder.

    Raises UserError for whatever the user can put right.
    """
    from pyfastlora.trainer import model as models
    from pyfastlora.trainer.data import report
    from pyfastlora.trainer.data.prepare import prepare

    report_dir = None if folder is None else RunDir(folder, "--report")
    if report_dir is not None:
        report_dir.check()
    for note in loaded.notes:
        console.say(f"note: {note}")
    with libraries_quiet():
        models.check_base_model(loaded.config, weights=False)
        tokenizer = models.load_tokenizer(loaded.config)
        with console.bar("tokenising", None, "rows") as bar:
            data = prepare(loaded.config, tokenizer, bar.update)
        for line in data.lines():
            console.say(line)
        facts = {name: report.describe(part) for name, part in _parts(data)}
        for name, found in facts.items():
            console.say(_line(name, found))
        for i, sample in enumerate(itertools.islice(_samples(data), show)):
            _show(sample, i, tokenizer, console)
        if report_dir is not None:
            report_dir.path.mkdir(parents=True, exist_ok=True)
            report_dir.write_json("report.json", data.report | facts)
            if data.train_rows:
                report.plot_lengths(data.train, loaded.config.sequence_len, report_dir.path / "lengths.png")
            console.say(f"the report is in {report_dir.path}")


def _parts(data: PreparedData) -> list[tuple[str, Any]]:
    """What is known before it is trained on."""
    train = data.train if data.train_rows else None
    return [(name, part) for name, part in (("train", train), ("held_out", data.held_out)) if part]


def _samples(data: PreparedData) -> Iterator[Any]:
    train: Any = data.train
    return (train[i] for i in range(len(train))) if data.train_rows else iter(train)


def _line(name: str, found: dict[str, Any]) -> str:
    share, lengths = found["trained_share"], (f"{mark} {value}" for mark, value in found["lengths"].items())
    text = f"{name}: {found['samples']} samples, {found['tokens']} tokens, {share:.0%} trained on; "
    return f"{text}lengths {', '.join(lengths)}; {found['duplicates']} duplicates"


def _show(sample: dict[str, Any], i: int, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    from pyfastlora.trainer.data.report import runs_of

    console.head(f"sample {i}: {len(sample['input_ids'])} tokens")
    console.coloured(
        (text if console.is_terminal or not trained else f"«{text}»", "bold green" if trained else "dim")
        for text, trained in runs_of(sample, tokenizer)
    )
