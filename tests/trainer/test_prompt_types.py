"""Tokens and labels of the types beside alpaca and completion, against text spelled out here."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pyfastlora.trainer.config import DatasetKeys
from pyfastlora.trainer.data import older
from pyfastlora.trainer.data.registry import CHATS, prompt_type, prompt_type_names
from pyfastlora.trainer.data.tokenise import IGNORED, Counts
from pyfastlora.trainer.errors import DataError

from .test_tokenise import WITH_INPUT, WITHOUT_INPUT, read, samples

PREAMBLE, PREAMBLE_WITH_INPUT = (text.partition("###")[0] for text in (WITHOUT_INPUT, WITH_INPUT))


# ---- one instruction, one response ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "prompt", "response"),
    [
        ("gpteacher", {"instruction": "Greet.", "response": "HI"}, WITHOUT_INPUT, "HI"),
        ("gpteacher", {"instruction": "Greet.", "input": "loudly", "response": "HI"}, WITH_INPUT, "HI"),
        ("oasst", {"INSTRUCTION": "Greet.", "RESPONSE": "HI"}, WITHOUT_INPUT, "HI"),
        (
            "alpaca_chat",
            {"instruction": "Greet.", "output": "HI"},
            PREAMBLE + "USER: Greet.\nASSISTANT:",
            "HI",
        ),
        (
            "alpaca_chat",
            {"instruction": "Greet.", "input": "loudly", "response": "HI"},
            PREAMBLE_WITH_INPUT + "USER: Greet.\nloudly\nASSISTANT:",
            "HI",
        ),
        (
            "alpaca_chat.load_qa",
            {"question": "Who?", "answer": "I"},
            PREAMBLE + "USER: Who?\nASSISTANT:",
            "I",
        ),
        (
            "alpaca_chat.load_camel_ai",
            {"message_1": "Who?", "message_2": "I"},
            PREAMBLE + "USER: Who?\nASSISTANT:",
            "I",
        ),
        (
            "alpaca_w_system.load_open_orca",
            {"system_prompt": "Be kind.", "question": "Who?", "response": "I"},
            "### System:\nBe kind.\n\n### Human:\nWho?\n\n### Assistant:\n",
            "I",
        ),
        (
            "alpaca_w_system.load_open_orca",
            {"system_prompt": "", "question": "Who?", "response": "I"},
            "### Human:\nWho?\n\n### Assistant:\n",
            "I",
        ),
        (
            "context_qa.load_v2",
            {"context": "A fox.", "question": "Who?", "answer": "it"},
            "Context: A fox.\nQuestion: Who?\n",
            "Answer: it",
        ),
        ("metharme", {"prompt": "<|user|>Who?<|model|>", "generation": "I"}, "<|user|>Who?<|model|>", "I"),
    ],
)
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
def test_instruction_and_response(make_tokenizer, kind, row, prompt, response, bos):
    tokenizer = make_tokenizer(bos)
    (sample,) = samples(tokenizer, [row], kind)
    assert read(tokenizer, sample) == (
        f"{'<s>' if bos else ''}{prompt}{response}</s>",
        f"{response}</s>",
    )


def test_a_row_without_its_fields_is_told_what_would_fit(make_tokenizer):
    for kind, row, fits in (
        ("gpteacher", {"instruction": "Greet.", "output": "HI"}, "alpaca"),
        ("alpaca", {"messages": []}, "chat_template"),
        ("metharme", {"conversations": []}, "sharegpt"),
        (None, {"INSTRUCTION": "a", "RESPONSE": "b"}, "oasst"),
    ):
        with pytest.raises(DataError, match=rf"data.jsonl:1: type .* needs .*\(type: {fits} would fit\)"):
            samples(make_tokenizer(), [row], kind)


ARTICLE = {"article": "A fox.", "question": "Who?", "unanswerable_question": "Why?", "answer": "it"}
CRITIQUE = {
    "instruction": "Greet.",
    "answer": "HI",
    "scores": {"tone": 3},
    "critiques": ["é"],
    "revision": "Hi!",
}
JUDGED = "scores:\n  tone: 3\ncritiques:\n- é\n"
CHOICES = {"question": "Who?", "choices": ["a fox", "a dog"]}
LISTED = '- "a fox"\n- "a dog"'


@pytest.mark.parametrize(
    ("kind", "row", "prompt", "response"),
    [
        (
            "jeopardy",
            {"question": "It says hello", "category": "foxes", "answer": "the fox"},
            older.QUIZ + "### Instruction:\nIt says hello\n\n### Input:\nfoxes\n\n### Response:\n",
            "what is the fox",
        ),
        (
            "reflection",
            {"instruction": "Greet.", "output": "HI", "reflection": "too loud", "corrected": "Hi."},
            older.REFLECT + "### Instruction:\nGreet.\n\n### Response:\n",
            "### Thought:\nHI\n\n### Agent Reflection:\ntoo loud\n\n### Final Response:\nHi.",
        ),
        (
            "explainchoice",
            CHOICES | {"explanation": "It is red."},
            older.EXPLAIN + f"### Instruction:\nWho?\n\n### Input:\n{LISTED}\n\n### Response:\n",
            "It is red.",
        ),
        (
            "concisechoice",
            CHOICES | {"solution": "a fox", "explanation": "not this"},
            older.CHOOSE + f"USER: Who?\n{LISTED}\nASSISTANT:",
            "a fox",
        ),
        (
            "summarizetldr",
            {"article": "A long fox.", "summary": "fox"},
            f"USER: {older.SUMMARISE}\nA long fox.\nASSISTANT:",
            "fox",
        ),
        (
            "alpaca_chat.load_concise",
            {"instruction": "Greet.", "input": "loudly", "response": "HI"},
            older.CONCISE + "USER: Greet.\nloudly\nASSISTANT:",
            "HI",
        ),
        ("context_qa", ARTICLE, older.READ + "USER: A fox.\n===\nWho?\nASSISTANT:", "it"),
        ("context_qa.load_404", ARTICLE, older.READ + "USER: A fox.\n===\nWhy?\nASSISTANT:", older.NOT_THERE),
        ("creative_acr.load_answer", CRITIQUE, "### Instruction:\nGreet.\n\n### Response:\n", "Hi!"),
        (
            "creative_acr.load_critique",
            CRITIQUE,
            older.CRITICISE + "### Instruction:\nGreet.\n\n### Answer:\nHI\n\n### Response:\n",
            JUDGED,
        ),
        (
            "creative_acr.load_revise",
            CRITIQUE,
            older.REVISE
            + f"### Instruction:\nGreet.\n\n### Answer:\nHI\n\n### Judgement:\n{JUDGED}\n\n### Response:\n",
            "Hi!",
        ),
    ],
)
def test_older_types(make_tokenizer, kind, row, prompt, response):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [row], kind)
    assert read(tokenizer, sample) == (f"<s>{prompt}{response}</s>", f"{response}</s>")


def test_jokes_and_role_play(make_tokenizer):
    tokenizer = make_tokenizer()
    row = {"conversations": [{"title": "fox", "text": "ha", "explanation": "haha"}]}
    (sample,) = samples(tokenizer, [row], "sharegpt_jokes")
    first, second = (f"USER: {said}\nASSISTANT:" for said in (older.JOKE.format("fox"), older.EXPLAIN_JOKE))
    assert read(tokenizer, sample) == (f"<s>{first} ha\n{second} haha\n</s>", " ha\n haha\n</s>")
    said = [("system", "Be a fox."), ("human", "Who?"), ("bot", "A fox."), ("human", "No."), ("bot", "Yes.")]
    row = {"conversations": [{"role": role, "value": value} for role, value in said]}
    (sample,) = samples(tokenizer, [row], "pygmalion")
    assert read(tokenizer, sample) == (
        "<s><|system|>Be a fox.<|user|>Who?<|model|>A fox.<|user|>No.<|model|>Yes.</s>",
        "A fox.Yes.</s>",
    )


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("explainchoice", CHOICES | {"choices": "a", "solution": "b"}, '"choices" must be a list of texts'),
        ("concisechoice", CHOICES | {"solution": 3}, '"solution" must be text; got int'),
        ("creative_acr.load_critique", CRITIQUE | {"answer": 3}, '"answer" must be text; got int'),
        (
            "sharegpt_jokes",
            {"conversations": [{"title": "a"}]},
            'entry 1 of "conversations" must be an object',
        ),
        ("pygmalion", {"conversations": [{"role": "fox", "value": "a"}]}, "is from 'fox'; known are system"),
        ("pygmalion", {"conversations": []}, '"conversations" must be a list with at least one entry'),
    ],
)
def test_older_types_that_do_not_fit(make_tokenizer, kind, row, reason):
    with pytest.raises(DataError, match=f"data.jsonl:1: .*{reason}"):
        samples(make_tokenizer(), [row], kind)


# ---- templates of one's own -------------------------------------------------------------------------------

OWN = {
    "field_instruction": "q",
    "field_input": "with",
    "field_output": "a",
    "system_prompt": "Be terse.",
    "system_format": "<<{system}>>\n",
    "format": "[{instruction} | {input}] ",
    "no_input_format": "[{instruction}] ",
}


@pytest.mark.parametrize(
    ("keys", "row", "prompt"),
    [
        ({}, {"q": "Who?", "with": "x", "a": "I"}, "<<Be terse.>>\n[Who? | x] "),
        ({}, {"q": "Who?", "a": "I"}, "<<Be terse.>>\n[Who?] "),
        ({"no_input_format": None}, {"q": "Who?", "with": "", "a": "I"}, "<<Be terse.>>\n[Who? | ] "),
        ({"field_system": "sys"}, {"q": "{Who}", "sys": "Be {kind}.", "a": "I"}, "<<Be {kind}.>>\n[{Who}] "),
        ({"field_system": "sys"}, {"q": "Who?", "sys": None, "a": "I"}, "<<Be terse.>>\n[Who?] "),
        ({"system_prompt": "", "system_format": "<<{system}>>"}, {"q": "Who?", "a": "I"}, "[Who?] "),
    ],
)
def test_a_template_of_ones_own(make_tokenizer, keys, row, prompt):
    tokenizer = make_tokenizer()
    (sample,) = samples(tokenizer, [row], {**OWN, **keys})
    assert read(tokenizer, sample) == (f"<s>{prompt}I</s>", "I</s>")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"format": "{instruktion}"}, r"has {instruktion}; it can have {instruction}, {input}"),
        ({"no_input_format": "{instruction"}, "is no format: expected '}' before end of string"),
        ({"system_format": "{}"}, r"has {}; it can have {system}"),
        ({"format": "{instruction!r}"}, "has {instruction!r}; it can have"),
        ({"format": "{instruction:>{input}}"}, "has {instruction:>{input}}; it can have"),
        ({"format": "{instruction.__class__}"}, "has {instruction.__class__}; it can have"),
    ],
)
def test_a_format_that_cannot_be_filled_in(keys, reason):
    with pytest.raises(ValidationError, match=reason):
        DatasetKeys(path="-", type={**OWN, **keys})


# ---- segments and token ids -------------------------------------------------------------------------------


def test_segments_are_all_there_is(make_tokenizer):
    tokenizer = make_tokenizer()
    row = {
        "segments": [
            {"label": True, "text": "<s>the "},
            {"label": False, "text": "fox\n"},
            {"label": True, "text": "says</s>"},
        ]
    }
    (sample,) = samples(tokenizer, [row], "input_output")
    assert read(tokenizer, sample) == ("<s>the fox\nsays</s>", "<s>the says</s>")


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([], "must be a list with at least one segment"),
        ("text", "must be a list with at least one segment"),
        ([{"text": "a"}], 'segment 1 of "segments" must be an object with "label"'),
        (
            [{"label": True, "text": "a"}, {"label": False, "text": 3}],
            '"text" of segment 2 must be text; got int',
        ),
    ],
)
def test_segments_that_are_none(make_tokenizer, segments, reason):
    with pytest.raises(DataError, match=f"data.jsonl:1: .*{reason}"):
        samples(make_tokenizer(), [{"segments": segments}], "input_output")


def test_token_ids_are_left_as_they_are(make_tokenizer):
    counts = Counts()
    rows = [
        {"input_ids": [0, 5, 6, 1], "labels": [IGNORED, IGNORED, 6, 1], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [7, 8], "labels": [7, 8]},
    ]
    found = samples(make_tokenizer(), rows, None, counts=counts)
    assert [(s["input_ids"], s["labels"]) for s in found] == [(r["input_ids"], r["labels"]) for r in rows]
    assert (counts.samples, counts.tokens, counts.trained_tokens) == (2, 6, 4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "must be of one length"),
        ({"input_ids": [1, "2"], "labels": [1, 2]}, '"input_ids" must be a list of whole numbers'),
        ({"input_ids": [1, True], "labels": [1, 1]}, '"input_ids" must be a list of whole numbers'),
        ({"input_ids": [1, -2], "labels": [1, -2]}, "must be from 0 to 383, as the tokenizer has 384 tokens"),
        ({"input_ids": [1, 384], "labels": [1, 384]}, "must be from 0 to 383, as the tokenizer has 384"),
        ({"input_ids": [], "labels": []}, '"input_ids" is empty'),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "must be its token's id, or -100"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "must be all 1"),
    ],
)
def test_token_ids_that_are_none(make_tokenizer, row, reason):
    with pytest.raises(DataError, match=f"data.jsonl:1: .*{reason}"):
        samples(make_tokenizer(), [row], None)


def test_every_name_has_a_type_and_a_line_in_the_page(make_tokenizer):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert {name for name in prompt_type_names() if f"`{name}`" not in text} == set()
    for name in prompt_type_names():
        keys = {"chat_template": "chatml"} if name in CHATS else {}
        found = prompt_type(DatasetKeys(path="-", type=name, **keys), make_tokenizer())
        assert found.name == name and found.fields
