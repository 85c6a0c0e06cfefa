"""What the model answers before and after training, on functions from held-out files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfastlora.trainer import model as models
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data import alpaca
from pyfastlora.trainer.inference import Sampling, generate
from pyfastlora.trainer.precision import device_of_run, resolve_precision
from pyfastlora.trainer.quickstart.corpus import INSTRUCTION, Pair

_CODE_CHARS = range(90, 260)  # short enough to read on a screen
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A function, its docstring, and what the model says without and with the adapter."""

    pair: Pair
    before: str
    after: str


def choose(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Readable pairs spread over the files, always the same ones."""
    readable = [p for p in pairs if len(p.code) in _CODE_CHARS] or list(pairs)
    stride = max(1, len(readable) // count)
    return readable[::stride][:count]


def answer(config: Config, adapter: Path, pairs: Sequence[Pair]) -> list[Sample]:
    """Greedy answers of the base, and of the base with the adapter as PEFT loads it from disk."""
    from peft import PeftModel

    device = device_of_run()
    base = models.load_base(config, resolve_precision(config, device), device)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = models.load_tokenizer(config)
    samples = []
    for pair in pairs:
        prompt = alpaca.prompt(INSTRUCTION, pair.code)
        with model.disable_adapter():
            before = _answer(model, tokenizer, prompt)
        samples.append(Sample(pair, before, _answer(model, tokenizer, prompt)))
    return samples


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    text = generate(model, tokenizer, tokenizer(prompt)["input_ids"], Sampling(_NEW_TOKENS))
    return " ".join(text.split()) or "(nothing)"
