"""Axolotl's older types: quizzes, summaries, questions on a text, critiques, jokes and role play.

Fields, headings and separators are theirs. The instructions that some of them open with are worded here anew:
a model that was trained elsewhere on such a type has seen another sentence at that place.

| type                         | fields                                                    |
| ---------------------------- | --------------------------------------------------------- |
| jeopardy                     | question, category, answer                                |
| reflection                   | instruction, input?, output, reflection, corrected        |
| explainchoice, concisechoice | question, choices (a list), solution (or explanation)     |
| summarizetldr                | article, summary                                          |
| alpaca_chat.load_concise     | instruction, input?, output (or response)                 |
| context_qa                   | article, question, answer                                 |
| context_qa.load_404          | article, unanswerable_question                            |
| creative_acr.load_answer     | instruction, revision                                     |
| creative_acr.load_critique   | instruction, answer, scores, critiques                    |
| creative_acr.load_revise     | the same and revision                                     |
| sharegpt_jokes               | conversations: title, text, explanation                   |
| pygmalion                    | conversations: role (system, human, bot), value           |
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence

import yaml

from pyfastlora.trainer.data.prompt import Piece, PromptType, Row, bad_text

QUIZ = "The instruction is a clue of a quiz show and the input its category. Answer it in a few words.\n\n"
REFLECT = (
    "Answer the instruction below: first with a thought, then with a critical reflection on it, and last "
    "with a response that has learnt from both.\n\n"
)
EXPLAIN = "Choose the best answer to the question and give your reasons.\n\n"
CHOOSE = "Choose the best answer to the question, in few words.\n\n"
SUMMARISE = "Give a TL;DR of this article."
CONCISE = "Carry out the instruction. Answer in few words.\n\n"
READ = "Answer the question in few words, from the text alone.\n\n"
NOT_THERE = "The text does not say, so that I cannot answer the question from it."
CRITICISE = "Judge how well the answer carries out the instruction: scores, and what is wrong, as YAML.\n\n"
REVISE = "Write the answer to the instruction again, better where it was criticised.\n\n"
JOKE, EXPLAIN_JOKE = "Tell me a joke about this: {}", "Explain the joke."


def _headed(instruction: str, **parts: str | None) -> str:
    """Under headings: the instruction, the parts that there are, and the response to come."""
    shown = {"Instruction": instruction, **parts}
    return "".join(f"### {name}:\n{text}\n\n" for name, text in shown.items() if text) + "### Response:\n"


def _spoken(instruction: str, input: str | None = None) -> str:
    return f"USER: {instruction}\n{input}\nASSISTANT:" if input else f"USER: {instruction}\nASSISTANT:"


def _type(
    name: str,
    fields: tuple[str, ...],
    prompt: Callable[[Row], str],
    response: Callable[[Row], str],
    optional: tuple[str, ...] = (),
    check: Callable[[Row], str | None] | None = None,
    also: Mapping[str, str] | None = None,
) -> PromptType:
    def render(row: Row) -> tuple[Piece, ...]:
        return Piece(prompt(row), False), Piece(response(row), True)

    return PromptType(name, fields, optional, render, check=check, also=also or {})


# ---- choices ----------------------------------------------------------------------------------------------


def _choices(row: Row) -> str:
    return "\n".join(f'- "{choice}"' for choice in row["choices"])


def _why_no_choices(row: Row) -> str | None:
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or any(bad_text(choice) for choice in choices):
        return '"choices" must be a list of texts'
    for name in ("question", "solution"):
        if (reason := bad_text(row[name])) is not None:
            return f'"{name}" {reason}'
    return None


# ---- critiques --------------------------------------------------------------------------------------------


def _judgement(row: Row) -> str:
    found = {name: row[name] for name in ("scores", "critiques")}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _why_no_judgement(texts: Sequence[str]) -> Callable[[Row], str | None]:
    def why_not(row: Row) -> str | None:
        for name in texts:
            if (reason := bad_text(row[name])) is not None:
                return f'"{name}" {reason}'
        try:
            _judgement(row)
        except yaml.YAMLError:
            return '"scores" and "critiques" must be what JSON can hold'
        return None

    return why_not


# ---- turns ------------------------------------------------------------------------------------------------


def _why_not_turns(names: Sequence[str], roles: Sequence[str] = ()) -> Callable[[Row], str | None]:
    def why_not(row: Row) -> str | None:
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns:
            return '"conversations" must be a list with at least one entry'
        for i, turn in enumerate(turns, 1):
            if not isinstance(turn, Mapping) or any(bad_text(turn.get(name)) for name in names):
                wanted = ", ".join(f'"{name}"' for name in names)
                return f'entry {i} of "conversations" must be an object with the texts {wanted}'
            if roles and turn["role"] not in roles:
                known, got = ", ".join(roles), reprlib.repr(turn["role"])
                return f'entry {i} of "conversations" is from {got}; known are {known}'
        return None

    return why_not


def _jokes(row: Row) -> tuple[Piece, ...]:
    pieces = []
    for turn in row["conversations"]:
        pieces += [Piece(_spoken(JOKE.format(turn["title"])), False), Piece(f" {turn['text']}\n", True)]
        pieces += [Piece(_spoken(EXPLAIN_JOKE), False), Piece(f" {turn['explanation']}\n", True)]
    return tuple(pieces)


MARKS: Mapping[str, str] = {"system": "<|system|>", "human": "<|user|>", "bot": "<|model|>"}


def _role_play(row: Row) -> tuple[Piece, ...]:
    pieces = []
    for turn in row["conversations"]:
        pieces += [Piece(MARKS[turn["role"]], False), Piece(turn["value"], turn["role"] == "bot")]
    return tuple(pieces)


def _thought(row: Row) -> str:
    parts = {"Thought": "output", "Agent Reflection": "reflection", "Final Response": "corrected"}
    return "\n\n".join(f"### {heading}:\n{row[field]}" for heading, field in parts.items())


def _asked(row: Row, field: str) -> str:
    return READ + _spoken(f"{row['article']}\n===\n{row[field]}")


_CRITIQUE = ("instruction", "answer", "scores", "critiques")
_CHOICE = ("question", "choices", "solution")


PROMPT_TYPES = (
    _type(
        "jeopardy",
        ("question", "category", "answer"),
        lambda row: QUIZ + _headed(row["question"], Input=row["category"]),
        lambda row: f"what is {row['answer']}",
    ),
    _type(
        "reflection",
        ("instruction", "output", "reflection", "corrected"),
        lambda row: REFLECT + _headed(row["instruction"], Input=row.get("input")),
        _thought,
        ("input",),
    ),
    _type(
        "explainchoice",
        _CHOICE,
        lambda row: EXPLAIN + _headed(row["question"], Input=_choices(row)),
        lambda row: row["solution"],
        check=_why_no_choices,
        also={"explanation": "solution"},
    ),
    _type(
        "concisechoice",
        _CHOICE,
        lambda row: CHOOSE + _spoken(row["question"], _choices(row)),
        lambda row: row["solution"],
        check=_why_no_choices,
        also={"explanation": "solution"},
    ),
    _type(
        "summarizetldr",
        ("article", "summary"),
        lambda row: _spoken(SUMMARISE, row["article"]),
        lambda row: row["summary"],
    ),
    _type(
        "alpaca_chat.load_concise",
        ("instruction", "output"),
        lambda row: CONCISE + _spoken(row["instruction"], row.get("input")),
        lambda row: row["output"],
        ("input",),
        also={"response": "output"},
    ),
    _type(
        "context_qa",
        ("article", "question", "answer"),
        lambda row: _asked(row, "question"),
        lambda row: row["answer"],
    ),
    _type(
        "context_qa.load_404",
        ("article", "unanswerable_question"),
        lambda row: _asked(row, "unanswerable_question"),
        lambda row: NOT_THERE,
    ),
    _type(
        "creative_acr.load_answer",
        ("instruction", "revision"),
        lambda row: _headed(row["instruction"]),
        lambda row: row["revision"],
    ),
    _type(
        "creative_acr.load_critique",
        _CRITIQUE,
        lambda row: CRITICISE + _headed(row["instruction"], Answer=row["answer"]),
        _judgement,
        check=_why_no_judgement(("instruction", "answer")),
    ),
    _type(
        "creative_acr.load_revise",
        (*_CRITIQUE, "revision"),
        lambda row: REVISE + _headed(row["instruction"], Answer=row["answer"], Judgement=_judgement(row)),
        lambda row: row["revision"],
        check=_why_no_judgement(("instruction", "answer", "revision")),
    ),
    PromptType(
        "sharegpt_jokes",
        ("conversations",),
        (),
        _jokes,
        check=_why_not_turns(("title", "text", "explanation")),
    ),
    PromptType(
        "pygmalion",
        ("conversations",),
        (),
        _role_play,
        check=_why_not_turns(("role", "value"), tuple(MARKS)),
    ),
)
