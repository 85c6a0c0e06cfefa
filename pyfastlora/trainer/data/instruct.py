"""One instruction, one response: the types that differ in the names of their fields and in their headings.

| type                             | fields                                    | text               |
| -------------------------------- | ----------------------------------------- | ------------------ |
| gpteacher                        | instruction, input?, response             | alpaca's           |
| oasst                            | INSTRUCTION, RESPONSE                     | alpaca's           |
| alpaca_chat                      | instruction, input?, output (or response) | USER: .. ASSISTANT: |
| alpaca_chat.load_qa              | question, answer                          | USER: .. ASSISTANT: |
| alpaca_chat.load_camel_ai        | message_1, message_2                      | USER: .. ASSISTANT: |
| alpaca_w_system.load_open_orca   | system_prompt?, question, response        | three headings     |
| context_qa.load_v2               | context, question, answer                 | three labels       |
| metharme                         | prompt, generation                        | none               |

The names are Axolotl's, so are the headings: models trained elsewhere on a type expect them.
"""

from __future__ import annotations

from collections.abc import Callable

from pyfastlora.trainer.data import alpaca
from pyfastlora.trainer.data.prompt import Piece, PromptType, Row

Prompt = Callable[[Row], str]


def _type(
    name: str,
    prompt: Prompt,
    response: str,
    fields: tuple[str, ...],
    optional: tuple[str, ...] = (),
    before: str = "",
    also: dict[str, str] | None = None,
) -> PromptType:
    """before: what the response is trained to begin with. also: other spellings of fields."""

    def render(row: Row) -> tuple[Piece, ...]:
        return Piece(prompt(row), False), Piece(before + row[response], True)

    return PromptType(name, (*fields, response), optional, render, also=also or {})


def _chat(instruction: str, input: str | None = None) -> str:
    preamble = (alpaca.WITH_INPUT if input else alpaca.WITHOUT_INPUT).partition("###")[0]
    said = f"{instruction}\n{input}" if input else instruction
    return f"{preamble}USER: {said}\nASSISTANT:"


def _open_orca(row: Row) -> str:
    system = row.get("system_prompt")
    opening = f"### System:\n{system}\n\n" if system else ""
    return f"{opening}### Human:\n{row['question']}\n\n### Assistant:\n"


PROMPT_TYPES = (
    _type(
        "gpteacher",
        lambda row: alpaca.prompt(row["instruction"], row.get("input")),
        "response",
        ("instruction",),
        ("input",),
    ),
    _type("oasst", lambda row: alpaca.prompt(row["INSTRUCTION"]), "RESPONSE", ("INSTRUCTION",)),
    _type(
        "alpaca_chat",
        lambda row: _chat(row["instruction"], row.get("input")),
        "output",
        ("instruction",),
        ("input",),
        also={"response": "output"},
    ),
    _type("alpaca_chat.load_qa", lambda row: _chat(row["question"]), "answer", ("question",)),
    _type("alpaca_chat.load_camel_ai", lambda row: _chat(row["message_1"]), "message_2", ("message_1",)),
    _type("alpaca_w_system.load_open_orca", _open_orca, "response", ("question",), ("system_prompt",)),
    _type(
        "context_qa.load_v2",
        lambda row: f"Context: {row['context']}\nQuestion: {row['question']}\n",
        "answer",
        ("context", "question"),
        before="Answer: ",
    ),
    _type("metharme", lambda row: row["prompt"], "generation", ("prompt",)),
)
