"""type: chat_template, and sharegpt: conversations of any number of turns, written by a chat template.

The template is the tokenizer's own, a Jinja text of the configuration's, or ChatML. Which tokens are trained
is read off the text it writes: what the template adds for a turn behind its generation prompt is that turn's,
so a response has the very tokens that a model is asked to continue with when it is used.
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row, bad_text
from pyfastlora.trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyfastlora.trainer.config import DatasetKeys

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_END = "<|im_end|>"
#: What sets of conversations call the four roles.
ROLES = {
    "system": ["system"],
    "user": ["user", "human", "prompter"],
    "assistant": ["assistant", "gpt", "bot", "model", "chatgpt"],
    "tool": ["tool", "function", "observation"],
}
#: The older types, which are this one with other names: role and content of a message.
SHAREGPT = {
    "sharegpt": ("from", "value"),
    "sharegpt.load_guanaco": ("from", "value"),
    "sharegpt.load_role": ("role", "value"),
}


class Conversations:
    """How one dataset's rows become text."""

    def __init__(self, entry: DatasetKeys, tokenizer: PreTrainedTokenizerBase) -> None:
        role, content = SHAREGPT.get(str(entry.type), ("role", "content"))
        names = entry.message_property_mappings
        self.role, self.content = names.get("role", role), names.get("content", content)
        self.field = entry.field_messages or ("conversations" if entry.type in SHAREGPT else "messages")
        known = ROLES if entry.roles is None else entry.roles
        self.roles = {name: role for role, names in known.items() for name in names}
        self.trained, self.flag = entry.roles_to_train, entry.message_field_training
        self.ends, self.tools = entry.train_on_eos, entry.field_tools
        self.template, self.end = _template(entry, tokenizer)
        self.tokenizer = tokenizer

    def why_not(self, row: Row) -> str | None:
        """Why a row's messages cannot be written."""
        messages = row[self.field]
        if not isinstance(messages, list) or not messages:
            return f'"{self.field}" must be a list with at least one message'
        for i, message in enumerate(messages, 1):
            if not isinstance(message, Mapping):
                return f'message {i} of "{self.field}" must be an object; got {type(message).__name__}'
            calls = message.get("tool_calls")
            if calls is not None and not _are_objects(calls):
                return f'"tool_calls" of message {i} must be a list of objects'
            if calls and "tool_calls" not in self.template:
                return f"message {i} calls tools, which the chat template does not write (tool_calls)"
            if self.role not in message or (self.content not in message and not calls):
                there = ", ".join(f'"{name}"' for name in list(message)[:8]) or "nothing"
                return (
                    f'message {i} of "{self.field}" needs "{self.role}" and "{self.content}"; it has {there}'
                )
            if not isinstance(message[self.role], str) or message[self.role] not in self.roles:
                known, got = ", ".join(self.roles), reprlib.repr(message[self.role])
                return f'message {i} of "{self.field}" is from {got}; known are {known} (roles)'
            content = message.get(self.content)
            if not (content is None and calls) and (reason := bad_text(content)) is not None:
                return f'"{self.content}" of message {i} {reason}'
            if self.flag and not isinstance(message.get(self.flag, False), bool):
                return f'"{self.flag}" of message {i} must be true or false'
        if self._trains(messages[0], self.roles[messages[0][self.role]]):
            return f'message 1 of "{self.field}" would be trained on: there is nothing to answer before it'
        tools = self.tools_of(row)
        return None if tools is None or _are_objects(tools) else f'"{self.tools}" must be a list of objects'

    def render(self, row: Row) -> tuple[Piece, ...]:
        messages = self.messages_of(row)
        trained = [i for i, m in enumerate(messages) if self._trains(row[self.field][i], m["role"])]
        write = functools.partial(self._write, tools=self.tools_of(row))
        whole = write(messages)
        pieces: list[Piece] = []
        at = 0
        for i in trained:
            begin, end = write(messages[:i], opened=True), write(messages[: i + 1])
            if not (whole.startswith(end) and end.startswith(begin) and len(begin) >= at):
                raise DataError(
                    f"the chat template writes message {i + 1} otherwise when others follow, or not behind "
                    "its generation prompt, so that its text cannot be told: train on the last message "
                    f"alone ({self.flag or 'message_field_training'}), or take another chat_template"
                )
            pieces += self._between(whole[at : len(begin)])
            pieces += self._turn(whole[len(begin) : len(end)], last=i == trained[-1])
            at = len(end)
        return tuple(piece for piece in (*pieces, *self._between(whole[at:])) if piece.text)

    def messages_of(self, row: Row) -> list[dict[str, Any]]:
        """A row's messages as the template gets them."""
        return [self._message(m) for m in row[self.field]]

    def opened(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """A conversation up to where the assistant is to go on."""
        return self._write(messages, tools, opened=True)

    def _message(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the template gets: role, content, and all else that the message says, such as tool_calls."""
        more = {k: v for k, v in given.items() if v is not None and k not in (self.role, self.content)}
        if "tool_calls" in more:
            more["tool_calls"] = [_with_arguments(call) for call in more["tool_calls"]]
        return more | {"role": self.roles[given[self.role]], "content": given.get(self.content) or ""}

    def tools_of(self, row: Row) -> Any:
        """The tools of a row; some sets have them as text."""
        tools = row.get(self.tools) if self.tools else None
        return _from_json(tools) if isinstance(tools, str) else tools

    def _trains(self, message: Mapping[str, Any], role: str) -> bool:
        if self.flag and self.flag in message:
            return bool(message[self.flag])
        return role in self.trained

    def _write(self, messages: Sequence[Any], tools: Any, opened: bool = False) -> str:
        if not messages and not opened:
            return ""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=opened,
            )
        except Exception as error:  # what templates raise is Jinja's, or anything at all
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"the chat template does not take its {len(messages)} messages: {reason}"
            ) from None
        return str(text)

    def _turn(self, text: str, last: bool) -> list[Piece]:
        """A trained turn: its text, the token that ends it, and what the template writes behind that."""
        said, end, rest = text.rpartition(self.end) if self.end else (text, "", "")
        if not end:
            said, rest = text, ""
        ends = self.ends in ("turn", "all") or (self.ends == "last" and last)
        return (
            [Piece(said + end, True), Piece(rest, False)]
            if ends
            else [
                Piece(said, True),
                Piece(end + rest, False),
            ]
        )

    def _between(self, text: str) -> list[Piece]:
        """What is not trained; of `train_on_eos: all`, but for the tokens that end its turns."""
        if self.ends != "all" or not self.end:
            return [Piece(text, False)]
        parts = text.split(self.end)
        ended = [piece for part in parts[:-1] for piece in (Piece(part, False), Piece(self.end, True))]
        return [*ended, Piece(parts[-1], False)]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, as templates want them; OpenAI's format has them as text."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": _from_json(arguments)} if isinstance(arguments, str) else dict(call)


def prompt_type(entry: DatasetKeys, tokenizer: PreTrainedTokenizerBase) -> PromptType:
    """The type of an entry; its template becomes the tokenizer's, to be saved with it."""
    chat = Conversations(entry, tokenizer)
    tokenizer.chat_template = chat.template
    optional = (chat.tools,) if chat.tools else ()
    return PromptType(str(entry.type), (chat.field,), optional, chat.render, check=chat.why_not, ends=False)


def _template(entry: DatasetKeys, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The Jinja text, and the token that ends a turn."""
    if entry.chat_template == "chatml":
        return CHATML, CHATML_END
    if entry.chat_template == "jinja":
        assert entry.chat_template_jinja is not None, "a rule of config/rules.py"
        return entry.chat_template_jinja, tokenizer.eos_token
    own = tokenizer.chat_template
    if not isinstance(own, str) and entry.chat_template == "tokenizer_default_fallback_chatml":
        return CHATML, CHATML_END
    if not isinstance(own, str):
        raise DataError(
            "the tokenizer has no chat template: set chat_template: chatml, or chat_template: jinja and "
            "chat_template_jinja"
        )
    return own, tokenizer.eos_token
