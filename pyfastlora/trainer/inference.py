"""`fastlora inference`: a model is asked in the words that it was trained with, and its answer streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.chat import Conversations
from pyfastlora.trainer.data.prompt import PromptType
from pyfastlora.trainer.data.registry import CHATS, prompt_type
from pyfastlora.trainer.data.tokenise import ends_of
from pyfastlora.trainer.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; temperature 0: the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of transformers' generate."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True} | {key: value for key, value in given.items() if value is not None}


class Prompts:
    """How the rows of one of a job's datasets are asked: as they are trained on, up to the response.

    stop: the text that ends a response, beside the tokenizer's EOS. chat: what writes conversations, if the
    dataset has them.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, number: int = 0, raw: bool = False
    ) -> None:
        entries = [*config.datasets, *(entry.as_dataset() for entry in config.pretraining_dataset)]
        if number not in range(len(entries)):
            raise ConfigError(f"--dataset {number}: datasets are counted from 0; there are {len(entries)}")
        self._tokenizer, self._raw = tokenizer, raw
        entry = config.with_template(entries[number])
        self.chat = Conversations(entry, tokenizer) if entry.type in CHATS and not raw else None
        self.stop = self.chat.end if self.chat else None
        self.name = (
            str(entry.type) if isinstance(entry.type, str) else "of your own" if entry.type else "none"
        )
        self._kind = prompt_type(entry, tokenizer)
        # token ids and segments say nothing of how a prompt looks
        self._as_it_is = raw or entry.type in (None, "input_output")

    def of_text(self, text: str, system: str | None = None) -> list[int]:
        """Token ids of a prompt: the instruction, question or message that it is for the dataset's type."""
        if self.chat:
            opening = [{"role": "system", "content": system}] if system else []
            return self.of_messages([*opening, {"role": "user", "content": text}])
        if system:
            raise ConfigError(f"--system goes with conversations; the dataset's type is {self.name}")
        if self._as_it_is:
            return list(self._tokenizer(text)["input_ids"])
        return self.of_row({self._kind.fields[0]: text})

    def of_row(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of a row of the dataset, its response left out. Raises ConfigError where more is."""
        if self._as_it_is:
            raise ConfigError(f"--row goes with a type that says how rows are asked; this one is {self.name}")
        if self.chat:
            if (why := self._kind.why_not(row)) is not None:
                raise ConfigError(f"--row: {why}")
            return self.of_messages(self.chat.messages_of(row), self.chat.tools_of(row))
        text = _prompt(self._kind, row)
        opening = ends_of(self._tokenizer).bos if self._kind.ends else []
        return [*opening, *self._encode(text)]

    def of_messages(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Token ids of a conversation that the model is to go on with."""
        assert self.chat is not None
        return self._encode(self.chat.opened(messages, tools))  # BOS is the template's to write

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def generate(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    sampling: Sampling = Sampling(),
    stop: str | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to a prompt of token ids; `say` hears it in pieces, while it is made.

    Raises UserError for a prompt that leaves no room for an answer.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(ids) >= room:
        raise UserError(f"the prompt has {len(ids)} tokens, and the model positions for {room}")
    longest = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room - len(ids))
    ends, text = _ends(model, tokenizer, stop)
    prompt = torch.tensor([list(ids)], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=longest,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=ends or None,
            streamer=None if say is None else _Stream(tokenizer, say, text or ""),
            **({"stop_strings": [text], "tokenizer": tokenizer} if text else {}),
            **sampling.arguments,
        )
    answer: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return answer.removesuffix(text) if text else answer


class _Stream(TextStreamer):
    """Hands text on as it becomes whole, without the text that ends it."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None], stop: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say, self._stop, self._held = say, stop, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held += text
        kept = 0 if stream_end else len(self._stop)  # it may be the beginning of the end
        if stream_end:
            self._held = self._held.removesuffix(self._stop)
        told = self._held[: len(self._held) - kept]
        self._held = self._held[len(told) :]
        if told:
            self._say(told)


def _ends(model: Any, tokenizer: Any, stop: str | None) -> tuple[list[int], str | None]:
    """The tokens that end an answer, and the text, where it is not one token."""
    known = getattr(model, "generation_config", None)
    given = getattr(known, "eos_token_id", None)
    ends = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    if stop is None:
        return sorted(ends), None
    ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
    return (sorted({*ends, ids[0]}), None) if len(ids) == 1 else (sorted(ends), stop)


def _prompt(kind: PromptType, row: Mapping[str, Any]) -> str:
    """What stands before the response. Fields that are not there may only be the response's."""
    values = dict(kind.spelled(row))
    if kind.splits:  # plain text is continued
        if (why := kind.why_not(values)) is not None:
            raise ConfigError(f"the prompt: {why}")
        return "".join(piece.text for piece in kind.render(values))
    missing = {field: f"\0{field}\0" for field in kind.fields if values.get(field) is None}
    if (why := kind.why_not(values | missing)) is not None:
        raise ConfigError(f"the prompt: {why}; give the row whole, with --row")
    before = []
    for piece in kind.render(values | missing):
        if piece.trained:
            break
        before.append(piece.text)
    text = "".join(before)
    if needed := [field for field, mark in missing.items() if mark in text]:
        names = " and ".join(f'"{field}"' for field in needed)
        raise ConfigError(f"type {kind.name} needs {names} as well; give the row with --row")
    return text
