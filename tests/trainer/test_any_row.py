"""Rows of anything, under every type: a sample, or one sentence that says where the row is."""

from __future__ import annotations

import random
from typing import Any

from pyfastlora.trainer.data.registry import CHATS, prompt_type_names
from pyfastlora.trainer.errors import DataError

from .test_tokenise import samples

VALUES: list[Any] = [
    *(None, 3, 2.5, True, float("nan"), "text", "", "\ud800", "x" * 2000, "{}", "{instruction}"),
    *([], [1], ["a"], [None], [[1]], {}, {"a": 1}, [{}], {"role": ["x"]}),
    *([{"role": "user", "content": "x"}], [{"from": "gpt", "value": "y"}], [{"label": True, "text": "z"}]),
    [{"role": "human", "value": "x"}, {"role": "bot", "value": "y"}],
]
FIELDS = [
    *("instruction", "input", "output", "response", "question", "answer", "choices", "solution"),
    *("explanation", "scores", "critiques", "revision", "conversations", "messages", "segments"),
    *("text", "input_ids", "labels", "attention_mask", "article", "summary", "prompt", "generation"),
    *("system_prompt", "category", "INSTRUCTION", "RESPONSE", "message_1", "message_2", "context"),
    *("unanswerable_question", "reflection", "corrected"),
]
TYPES = (*prompt_type_names(), None, {"format": "{instruction}|{input}"})


def test_any_row_of_any_type(make_tokenizer):
    chosen, tokenizer, good = random.Random(0), make_tokenizer(), 0
    for _ in range(3000):
        kind = chosen.choice(TYPES)
        row: Any = {field: chosen.choice(VALUES) for field in chosen.sample(FIELDS, chosen.randint(5, 33))}
        if chosen.random() < 0.05:
            row = chosen.choice([None, 3, "x", [1], {}])
        keys = {"chat_template": "chatml"} if kind in CHATS else {}
        try:
            good += len(samples(tokenizer, [row], kind, keys=keys, sequence_len=64))
        except DataError as error:
            assert str(error).startswith("data.jsonl:1: ") and "\n" not in str(error)
    assert good > 50  # some fit
