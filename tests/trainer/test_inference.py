"""`fastlora inference`: prompts against the tokens that training has, answers against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pyfastlora.cli.inference import inference
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.data.prepare import prepare
from pyfastlora.trainer.data.tokenise import IGNORED
from pyfastlora.trainer.inference import Prompts, Sampling, generate

CHAT = {
    "messages": [
        {"role": "system", "content": "Be loud."},
        {"role": "user", "content": "greet"},
        {"role": "assistant", "content": "hello"},
    ]
}
ALPACA = {"instruction": "greet", "input": "loud", "output": "hello"}
#: A row of each kind, the fields that are its response, and what its dataset says beside its type.
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "alpaca": (ALPACA, ("output",), {}),
    "gpteacher": ({"instruction": "greet", "response": "hello"}, ("response",), {}),
    "alpaca_chat": ({"instruction": "greet", "response": "hello"}, ("response",), {}),
    "context_qa.load_v2": ({"context": "a fox", "question": "who", "answer": "it"}, ("answer",), {}),
    "alpaca_w_system.load_open_orca": (
        {"system_prompt": "s", "question": "who", "response": "it"},
        ("response",),
        {},
    ),
    "metharme": ({"prompt": "the", "generation": " fox"}, ("generation",), {}),
    "reflection": (
        {"instruction": "i", "output": "o", "reflection": "r", "corrected": "c"},
        ("output", "reflection", "corrected"),
        {},
    ),
    "chat_template": (CHAT, (), {"chat_template": "chatml"}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]},
        (),
        {"chat_template": "chatml"},
    ),
    "template": (
        {"q": "who", "input": "x", "a": "it"},
        ("a",),
        {
            "type": {
                "field_instruction": "q",
                "field_output": "a",
                "format": "[{instruction} {input}]",
                "system_prompt": "s",
            }
        },
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_prompt_has_the_tokens_of_training(kind, make_tokenizer, write_jsonl, tmp_path):
    row, response, more = ROWS[kind]
    entry = {"path": str(write_jsonl([row])), "type": kind} | more
    config = Config(
        base_model="-", datasets=[entry], learning_rate=1e-3, dataset_prepared_path=str(tmp_path / "data")
    )
    tokenizer = make_tokenizer()
    sample = prepare(config, tokenizer).train[0]
    trained = next(i for i, label in enumerate(sample["labels"]) if label != IGNORED)
    asked = {k: v for k, v in row.items() if k not in response}
    for field in ("messages", "conversations"):
        if field in asked:
            asked[field] = asked[field][:-1]
    prompts = Prompts(config, tokenizer)
    assert prompts.of_row(asked) == sample["input_ids"][:trained]
    first = {"alpaca": "instruction", "metharme": "prompt", "gpteacher": "instruction", "template": "q"}
    if kind in first:
        alone = {k: v for k, v in asked.items() if k != "input"}
        assert prompts.of_text(row[first[kind]]) == prompts.of_row(alone)
    if kind == "chat_template":
        assert prompts.of_text("greet", system="Be loud.") == sample["input_ids"][:trained]


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """job(type, extra): the configuration of a finished run, whose adapter changes the tiny model."""

    def make(kind: str = "alpaca", extra: str = "") -> Path:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.add_(torch.randn_like(p) * 0.2)
        model.save_pretrained(tmp_path / "out")
        path = tmp_path / "cfg.yaml"
        path.write_text(
            f"base_model: {tiny_model}\ndatasets:\n  - path: none.jsonl\n    type: {kind}\n"
            f"adapter: lora\nlora_target_linear: true\nlearning_rate: 1e-3\nbf16: false\n"
            f"output_dir: {tmp_path}/out\n{extra}"
        )
        return path

    return make


def ask(config: Path, *arguments: object, input: str | None = None) -> Result:
    command = [str(config), "--max-new-tokens", "12", *map(str, arguments)]
    return CliRunner().invoke(inference, command, input=input, catch_exceptions=False)


def answer(tiny_model: Path, tmp_path: Path, text: str, adapted: bool = True, special: bool = True) -> str:
    """transformers' greedy answer to a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if adapted:
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    ids = torch.tensor([tokenizer(text, add_special_tokens=special)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_transformers(job, tiny_model, tmp_path):
    from pyfastlora.trainer.data import alpaca

    config, asked = job(), alpaca.prompt("the fox")
    wanted = answer(tiny_model, tmp_path, asked)
    assert wanted.strip() and wanted != answer(tiny_model, tmp_path, asked, adapted=False)
    assert ask(config, "--prompt", "the fox").stdout == wanted + "\n"
    assert ask(config, input="the fox\n").stdout == wanted + "\n"
    (tmp_path / "prompt.txt").write_text("the fox")
    assert ask(config, "--prompt-file", tmp_path / "prompt.txt").stdout == wanted + "\n"
    assert ask(config, "--prompt-file", "-", input="the fox").stdout == wanted + "\n"
    assert ask(config, "--adapter", tmp_path / "out", "--prompt", "the fox").stdout == wanted + "\n"
    base = answer(tiny_model, tmp_path, asked, adapted=False)
    assert ask(config, "--base", "--prompt", "the fox").stdout == base + "\n"
    raw = answer(tiny_model, tmp_path, "the fox")
    assert ask(config, "--raw", "--prompt", "the fox").stdout == raw + "\n"
    lines = ask(config, "--chat", input="the fox\n\n/reset\nthe fox\n")
    assert lines.stdout == f"{wanted}\n{wanted}\n" and "has no turns" in lines.stderr


def test_a_conversation_goes_on(job, tiny_model, tmp_path):
    """Each turn is answered with all that was said before it, in ChatML."""
    config = job("chat_template", "chat_template: chatml\n")
    opened = "<|im_start|>system\nBe loud.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first = opened.format("the fox")
    one = answer(tiny_model, tmp_path, first, special=False)
    second = f"{first}{one}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    two = answer(tiny_model, tmp_path, second, special=False)
    begun = opened.format("hello")
    anew = answer(tiny_model, tmp_path, begun, special=False)
    assert two != anew
    said = ask(config, "--chat", "--system", "Be loud.", input="the fox\nhello\n/reset\nhello\n")
    assert said.stdout == f"{one}\n{two}\n{anew}\n"


def test_chance_is_decided_by_the_seed(job):
    config = job()
    heat = ("--prompt", "x", "--temperature", "2", "--top-k", "300", "--top-p", "0.99")
    one, again, other = (ask(config, *heat, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("single", [True, False], ids=["one token", "text"])
def test_an_answer_ends_where_its_turn_does(make_tokenizer, single):
    """The model says "hello", then the end of the turn, for ever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    if single:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    said = tokenizer("hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert (len(said) < 8) == single
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    steps = iter(said * 9)

    def scripted(*arguments: Any, **keywords: Any) -> Any:
        out = LlamaForCausalLM.forward(model, *arguments, **keywords)
        out.logits = torch.nn.functional.one_hot(torch.tensor([[next(steps)]]), len(tokenizer)).float()
        return out

    model.forward = scripted
    told: list[str] = []
    text = generate(model, tokenizer, [5], Sampling(60), "<|im_end|>", told.append)
    assert text == "".join(told) == "hello"
    with pytest.raises(Exception, match="the prompt has 5000 tokens, and the model positions for 2048"):
        generate(model, tokenizer, [5] * 5000)


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("alpaca", ("--prompt", "x", "--chat"), "give one of --prompt, --prompt-file, --row and --chat"),
        (
            "alpaca",
            ("--prompt", "x", "--top-k", "3"),
            "--top-p, --top-k and --seed need --temperature above 0",
        ),
        (
            "alpaca",
            ("--prompt", "x", "--system", "y"),
            "--system goes with conversations; the dataset's type is",
        ),
        ("alpaca", ("--row", "[1]"), "--row must be an object with the dataset's fields; got [1]"),
        ("alpaca", ("--row", "{"), "--row: not JSON"),
        ("alpaca", (), "the prompt is empty"),
        (
            "alpaca",
            ("--prompt", "x", "--dataset", "2"),
            "--dataset 2: datasets are counted from 0; there are 1",
        ),
        ("context_qa.load_v2", ("--prompt", "x"), 'needs "question" as well; give the row with --row'),
        ("explainchoice", ("--prompt", "x"), '"choices" must be'),
        ("input_output", ("--row", "{}"), "--row goes with a type that says how rows are asked"),
    ],
)
def test_mistakes(job, kind, arguments, sentence):
    result = ask(job(kind), *arguments)
    assert result.exit_code == 2 and sentence in result.stderr, result.stderr
