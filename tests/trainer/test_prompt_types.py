"""Tokens and labels of the types beside alpaca and completion, against text spelled out here."""

from __future__ import annotations

import json
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


# ---- conversations ----------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes."},
]
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\nI.<|im_end|>\n"
    "<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
)
#: Brackets for users, the tokenizer's end for assistants, no generation prompt of its own.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
JINJA = {"chat_template": "jinja", "chat_template_jinja": BRACKETS}


def chat(tokenizer, messages, kind="chat_template", field="messages", **keys):
    (sample,) = samples(tokenizer, [{field: messages}], kind, keys=keys)
    return read(tokenizer, sample)


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, "I.<|im_end|>Yes.<|im_end|>"),
        ({"train_on_eos": "none"}, "I.Yes."),
        ({"train_on_eos": "last"}, "I.Yes.<|im_end|>"),
        ({"train_on_eos": "all"}, "<|im_end|><|im_end|>I.<|im_end|><|im_end|>Yes.<|im_end|>"),
        ({"roles_to_train": []}, None),
    ],
)
def test_chatml(make_tokenizer, keys, trained):
    tokenizer = make_tokenizer()
    if trained is None:
        counts = Counts()
        assert not samples(
            tokenizer,
            [{"messages": TALK}],
            "chat_template",
            counts=counts,
            keys={"chat_template": "chatml", **keys},
        )
        assert counts.dropped_untrained == 1
        return
    assert chat(tokenizer, TALK, chat_template="chatml", **keys) == (CHATML, trained)


def test_the_template_of_the_tokenizer_or_of_the_configuration(make_tokenizer):
    expected = ("<s>[Be kind.][Who?]I.</s>[Really?]Yes.</s>", "I.</s>Yes.</s>")
    tokenizer = make_tokenizer()
    assert chat(tokenizer, TALK, **JINJA) == expected
    assert tokenizer.chat_template == BRACKETS  # to be saved with it
    assert chat(tokenizer, TALK) == expected
    with pytest.raises(DataError, match="the tokenizer has no chat template: set chat_template: chatml"):
        chat(make_tokenizer(), TALK)


def test_users_and_single_messages_can_be_trained_on(make_tokenizer):
    tokenizer = make_tokenizer()
    both = chat(tokenizer, TALK, **JINJA, roles_to_train=["user", "assistant"])
    assert both[1] == "[Who?]I.</s>[Really?]Yes.</s>"
    flagged = [dict(m, train=i in (1, 4)) for i, m in enumerate(TALK)]
    assert chat(tokenizer, flagged, **JINJA, message_field_training="train")[1] == "[Who?]Yes.</s>"


def test_sharegpt_and_other_names(make_tokenizer):
    tokenizer = make_tokenizer()
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    assert chat(tokenizer, talk, "sharegpt", "conversations", chat_template="chatml")[0] == CHATML
    guanaco = [{"from": m["from"].replace("human", "prompter"), "value": m["value"]} for m in talk]
    guanaco = [{**m, "from": m["from"].replace("gpt", "assistant")} for m in guanaco]
    by_role = [{"role": m["from"], "value": m["value"]} for m in talk]
    for kind, spelled in (("sharegpt.load_guanaco", guanaco), ("sharegpt.load_role", by_role)):
        assert chat(tokenizer, spelled, kind, "conversations", chat_template="chatml")[0] == CHATML
    other = [{"who": m["role"][0], "says": m["content"]} for m in TALK]
    keys = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"system": ["s"], "user": ["u"], "assistant": ["a"]},
    }
    assert chat(tokenizer, other, "chat_template", "talk", chat_template="chatml", **keys)[0] == CHATML


def test_tools_reach_the_template(make_tokenizer):
    template = "{% for t in tools or [] %}({{ t['name'] }}){% endfor %}" + BRACKETS
    row = {"messages": TALK[1:3], "tools": [{"name": "clock"}]}
    tokenizer, keys = make_tokenizer(), {**JINJA, "chat_template_jinja": template, "field_tools": "tools"}
    (sample,) = samples(tokenizer, [row], "chat_template", keys=keys)
    assert read(tokenizer, sample) == ("(clock)<s>[Who?]I.</s>", "I.</s>")


CALLS = (
    "{{ tools | length }}{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ c.function.arguments.at }}){% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}{{ m.name }}={{ m.content }};{% elif m.role == 'assistant' %}"
    "{{ m.content + eos_token }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "text"])
def test_calls_of_tools_as_openai_writes_them(make_tokenizer, as_text):
    """No content beside the calls; arguments, and the tools themselves, may be JSON in a string."""
    arguments, tools = {"at": "noon"}, [{"name": "clock"}]
    call = {"function": {"name": "clock", "arguments": json.dumps(arguments) if as_text else arguments}}
    talk = [
        {"role": "user", "content": "When?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "12:00"},
        {"role": "assistant", "content": "Now."},
    ]
    row = {"messages": talk, "tools": json.dumps(tools) if as_text else tools}
    tokenizer, keys = make_tokenizer(), {**JINJA, "chat_template_jinja": CALLS, "field_tools": "tools"}
    (sample,) = samples(tokenizer, [row], "chat_template", keys=keys)
    whole = "1[When?]clock(noon)</s>clock=12:00;Now.</s>"
    assert read(tokenizer, sample) == (whole, "clock(noon)</s>Now.</s>")
    with pytest.raises(DataError, match="message 2 calls tools, which the chat template does not write"):
        samples(tokenizer, [row], "chat_template", keys={"chat_template": "chatml"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tool_calls": [3]}, '"tool_calls" of message 2 must be a list of objects'),
        ({"tool_calls": [], "content": None}, '"content" of message 2 must be text; got NoneType'),
    ],
)
def test_calls_that_are_none(make_tokenizer, change, reason):
    talk = [TALK[1], TALK[2] | change]
    with pytest.raises(DataError, match=reason):
        chat(make_tokenizer(), talk, **JINJA)


@pytest.mark.parametrize("response", ["\nthe", "x", "  ", "你好 🦊", "a\r\nb", "hello " * 300])
def test_a_response_follows_the_tokens_that_a_model_is_asked_with(make_tokenizer, response):
    tokenizer = make_tokenizer()
    talk = [*TALK[:4], {"role": "assistant", "content": response}]
    (sample,) = samples(
        tokenizer, [{"messages": talk}], "chat_template", sequence_len=4096, keys={"chat_template": "chatml"}
    )
    asked = tokenizer.apply_chat_template(talk[:4], add_generation_prompt=True, tokenize=False)
    # piece by piece, as the turns before it were trained
    whole, trained = read(tokenizer, sample)
    assert whole.startswith(asked) and trained == f"I.<|im_end|>{response}<|im_end|>"
    last = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    own = tokenizer(response + "<|im_end|>", add_special_tokens=False)["input_ids"]
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert sample["input_ids"][-len(last + own + end) :] == last + own + end
    assert sample["labels"][-len(own + end) :] == own + [IGNORED] * len(end)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", '"messages" must be a list with at least one message'),
        ([], '"messages" must be a list with at least one message'),
        (["hello"], 'message 1 of "messages" must be an object; got str'),
        (
            [{"from": "a", "text": "b"}],
            'message 1 of "messages" needs "role" and "content"; it has "from", "text"',
        ),
        (
            [{"role": "narrator", "content": "b"}],
            "message 1 of .* is from 'narrator'; known are system, ",
        ),
        ([{"role": ["user"], "content": "b"}], r"message 1 of .* is from \['user'\]; known are system, "),
        ([{"role": "assistant", "content": "b"}], "message 1 of .* would be trained on: there is nothing to"),
        ([{"role": "user", "content": None}], '"content" of message 1 must be text; got NoneType'),
        ([{"role": "user", "content": "\ud800"}], '"content" of message 1 has half of a surrogate pair'),
    ],
)
def test_messages_that_are_none(make_tokenizer, messages, reason):
    with pytest.raises(DataError, match=f"data.jsonl:1: {reason}"):
        chat(make_tokenizer(), messages, chat_template="chatml")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ raise_exception('only one turn') }}",
            "the chat template does not take its 5 messages: only one turn",
        ),
        ("{{ messages[9]['content'].x.y }}", "the chat template does not take its 5 messages"),
        (
            "{{ messages | length }}" + BRACKETS,
            "the chat template writes message 3 otherwise when others follow",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on(make_tokenizer, template, reason):
    with pytest.raises(DataError, match=f"data.jsonl:1: {reason}"):
        chat(make_tokenizer(), TALK, chat_template="jinja", chat_template_jinja=template)


def test_every_name_has_a_type_and_a_line_in_the_page(make_tokenizer):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert {name for name in prompt_type_names() if f"`{name}`" not in text} == set()
    for name in prompt_type_names():
        keys = {"chat_template": "chatml"} if name in CHATS else {}
        found = prompt_type(DatasetKeys(path="-", type=name, **keys), make_tokenizer())
        assert found.name == name and found.fields
