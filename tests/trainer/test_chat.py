"""Tokens and labels of conversations, through templates spelled out here."""

from __future__ import annotations

import json

import pytest

from pyfastlora.trainer.data.tokenise import IGNORED, Counts
from pyfastlora.trainer.errors import DataError

from .test_tokenise import read, samples

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
