"""`fastlora evaluate`: loss, perplexity and accuracy of a model on what is held out, by dataset and in all.

Means are over trained tokens, whatever the batches, so the loss in all is the trainer's eval_loss. Samples
are not packed, which changes no number. Logits are made for the positions that somebody is asked about, where
the model can do that, and never copied whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pyfastlora
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.config.load import LoadedConfig
from pyfastlora.trainer.console import Bar, Console
from pyfastlora.trainer.data.collator import PaddingCollator
from pyfastlora.trainer.data.prepare import held_out_by_dataset
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.errors import ConfigError
from pyfastlora.trainer.job import libraries_quiet
from pyfastlora.trainer.loading import Choice, LoadedModel, load, memory_told, tokenizer_of

if TYPE_CHECKING:
    from datasets import Dataset

_POSITIONS = 256  # whose logits are in float32 at once


@dataclass(frozen=True)
class Score:
    """Sums over the trained tokens of some samples."""

    samples: int = 0
    tokens: int = 0
    nats: float = 0.0
    right: int = 0  # tokens that are the model's first choice

    def __add__(self, other: Score) -> Score:
        return Score(*(a + b for a, b in zip(self._sums, other._sums, strict=True)))

    @property
    def _sums(self) -> tuple[Any, ...]:
        return self.samples, self.tokens, self.nats, self.right

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, float]:
        """The means, for a JSON file."""
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        return {
            "samples": self.samples,
            "trained_tokens": self.tokens,
            "loss": self.loss,
            "perplexity": perplexity,
            "accuracy": self.right / self.tokens,
        }


@dataclass(frozen=True)
class Evaluation:
    """Of one model, by dataset."""

    model: str
    scores: dict[str, Score]

    @property
    def all(self) -> Score:
        """Of all datasets together."""
        return sum(self.scores.values(), Score())

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        parts = {name: score.to_dict() for name, score in self.scores.items()}
        return {"model": self.model, "datasets": parts, "all": self.all.to_dict()}


def evaluate(loaded: LoadedConfig, choice: Choice, console: Console) -> Evaluation:
    """Scores of the model that is meant. Raises UserError for whatever the user can put right."""
    config = loaded.config
    if not config.test_datasets and not config.val_set_size:
        raise ConfigError("nothing is held out to evaluate: set test_datasets or val_set_size")
    with libraries_quiet(), memory_told("a smaller eval_batch_size takes less"):
        tokenizer = tokenizer_of(config)
        with console.bar("tokenising", None, "rows") as bar:
            parts = held_out_by_dataset(config, tokenizer, bar.update)
        model = load(config, choice)
        if config.fastlora and hasattr(model.model, "peft_config"):
            pyfastlora.patch(model.model)
        with console.bar("evaluating", sum(map(len, parts.values())), "samples") as bar:
            return Evaluation(model.name, _scores(model, parts, config, bar))


def say(found: Evaluation, console: Console) -> None:
    """Prints a table."""
    console.head(found.model)
    rows = [*found.scores.items(), *([("all", found.all)] if len(found.scores) > 1 else [])]
    width = max(len(name) for name, _ in rows)
    console.say(f"{'':{width}}  samples  trained tokens      loss  perplexity  accuracy")
    for name, score in rows:
        s = score.to_dict()
        console.say(
            f"{name:{width}}  {s['samples']:7}  {s['trained_tokens']:14}  {s['loss']:8.4f}  "
            f"{s['perplexity']:10.4g}  {s['accuracy']:8.2%}"
        )


def _scores(model: LoadedModel, parts: dict[str, Dataset], config: Config, bar: Bar) -> dict[str, Score]:
    size = config.eval_batch_size or config.micro_batch_size
    collate = PaddingCollator(model.tokenizer.pad_token_id or 0)
    scores, done = {}, 0
    for name, data in parts.items():
        score = Score()
        lengths = data["length"]
        order = sorted(
            range(len(data)), key=lengths.__getitem__, reverse=True
        )  # alike in length: less padding
        for start in range(0, len(order), size):
            batch = collate([data[i] for i in order[start : start + size]])
            score += _score(model, batch)
            bar.update(done + score.samples)
        scores[name], done = score, done + score.samples
    return scores


def _score(model: LoadedModel, batch: dict[str, Tensor]) -> Score:
    wanted = batch["labels"][:, 1:]
    asked = wanted != IGNORED
    columns = asked.any(0).nonzero()[:, 0]  # positions at which some sample is asked for the next token
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    some = {"logits_to_keep": columns.to(model.device)} if _can_keep_some(model.model) else {}
    with torch.no_grad(), model.precision.cast(model.device):
        logits = model.model(**inputs, **some, use_cache=False).logits
    if not some:
        logits = logits[:, columns.to(logits.device)]
    wanted, asked = wanted[:, columns].to(logits.device), asked[:, columns].to(logits.device)
    nats, right = 0.0, 0
    for row, targets, counts in zip(logits, wanted, asked, strict=True):
        for part, target in zip(
            row[counts].split(_POSITIONS), targets[counts].split(_POSITIONS), strict=True
        ):
            nats += torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").double().item()
            right += int((part.argmax(-1) == target).sum())
    return Score(len(wanted), int(asked.sum()), nats, right)


def _can_keep_some(model: Any) -> bool:
    """Whether the model makes logits of chosen positions alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward: Callable[..., Any] = base.forward
    return "logits_to_keep" in inspect.signature(forward).parameters
