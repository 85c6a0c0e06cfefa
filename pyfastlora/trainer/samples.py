"""What the model answers to held-out prompts before and after training, for samples.json and the report.

A prompt is what stands before the first trained token of a held-out sample: so every type of prompt has one
but text that is trained on whole. The first process answers, on its whole model, without drawing a random
number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.inference import Sampling, generate
from pyfastlora.trainer.precision import Precision
from pyfastlora.trainer.processes import Processes
from pyfastlora.trainer.run_dir import RunDir
from pyfastlora.trainer.strategy import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 64
TRIED = 64  # held-out samples that are looked at for each prompt that is wanted


@dataclass
class Sample:
    """A prompt as token ids; stop: the text that ends an answer, beside the tokenizer's EOS."""

    ids: list[int]
    prompt: str
    wanted: str
    stop: str | None
    answers: dict[str, str] = field(default_factory=dict)


class Samples:
    """Of one run; none where it asks for none."""

    def __init__(self, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
        self._samples, self._tokenizer = samples, tokenizer

    @classmethod
    def of(
        cls,
        config: Config,
        held_out: Any,
        tokenizer: PreTrainedTokenizerBase,
        strategy: Strategy,
        processes: Processes,
        console: Console,
    ) -> Samples:
        """Spread over the held-out data, always the same ones."""
        if held_out is None or not config.report_samples or not processes.is_first:
            return cls([], tokenizer)
        if strategy.divides_weights:
            console.say(f"no samples in the report: with {strategy.name} no process has a model to ask")
            return cls([], tokenizer)
        return cls(_chosen(held_out, config.report_samples, tokenizer), tokenizer)

    def ask(self, model: Any, precision: Precision, when: str) -> None:
        """Answers of the model as it is now; when is `before` or `after`."""
        if not self._samples:
            return
        training, device = model.training, model.device
        model.eval()
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), precision.cast(device):
            for sample in self._samples:
                how = Sampling(NEW_TOKENS)
                sample.answers[when] = generate(model, self._tokenizer, sample.ids, how, sample.stop)
        model.train(training)

    def save(self, run_dir: RunDir, step: int | None = None) -> None:
        """All answers so far, into samples.json; step: after which the later ones were given."""
        told = [{"prompt": s.prompt, "wanted": s.wanted, **s.answers} for s in self._samples]
        if told:
            run_dir.write_json("samples.json", {"tokens": NEW_TOKENS, "step": step, "samples": told})


def _chosen(held_out: Any, count: int, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    stride = max(1, len(held_out) // (count * TRIED))
    indices = range(0, len(held_out), stride)
    found: list[Sample] = []
    for part in range(count):  # a share of the data for each
        share = indices[part * len(indices) // count : (part + 1) * len(indices) // count]
        known = [s.ids for s in found]
        read = (_sample(held_out[i], tokenizer) for i in share)
        found += itertools.islice((s for s in read if s and s.ids not in known), 1)
    return found


def _sample(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sample | None:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    start = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    prompt = str(tokenizer.decode(ids[:start]))
    if not str(tokenizer.decode(ids[:start], skip_special_tokens=True)).strip():
        return None
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    last = ids[end - 1]
    stop = tokenizer.decode([last]) if last in tokenizer.all_special_ids else None
    wanted = tokenizer.decode(ids[start:end], skip_special_tokens=True)
    return Sample(ids[:start], prompt, str(wanted), None if stop is None else str(stop))
