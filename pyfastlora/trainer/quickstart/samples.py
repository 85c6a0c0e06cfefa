"""What the model answers before and after training, on functions from held-out files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastlora.trainer import model as models
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data import alpaca
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
            before = _generate(model, tokenizer, prompt)
        samples.append(Sample(pair, before, _generate(model, tokenizer, prompt)))
    return samples


def _generate(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split()) or "(nothing)"
