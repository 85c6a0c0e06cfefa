"""Writes docs/fallbacks.md: `python -m pyfastlora.patching.fallbacks > docs/fallbacks.md`.

The tables are read off the functions of `conditions.py` and `conditions_embedding.py`: the first sentence of
a docstring says what is checked, the strings that it returns are what a user reads. So neither can be
forgotten when a condition changes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from pyfastlora.patching import conditions, conditions_embedding
from pyfastlora.weights import bnb_4bit, bnb_8bit, dense

_HEAD = """\
# When PEFT's own forward runs

Every call of a patched layer checks the conditions below, on what the modules hold at that moment. Where
one does not hold, PEFT's own forward runs, and `pyfastlora.report(model)` shows the sentence on the right
(`…` stands for what was seen). Nothing is decided for good: when the cause goes, the next call runs fused.

L1 is checked by `patch`: a layer that fails it keeps its class. This page is made from the functions in
`pyfastlora/patching/conditions.py` by `python -m pyfastlora.patching.fallbacks > docs/fallbacks.md`.

"""

_TABLE = """\
| | what is checked | what the report says |
|---|---|---|
"""

_EMBEDDINGS = """
## Embeddings

For these, four of the conditions are others, and L7 is not asked: PEFT applies no dropout to an embedding.

"""

_LEFT = """
## Layers that are left to PEFT

Of PEFT's other classes L1 says what keeps them from being fused:

| layer | why |
|---|---|
"""

_TAIL = """
## What fused layers ask of the code around them

Three things that work with PEFT raise an error, autograd's own, and never a wrong number:

- Writing in place to a layer's input after its forward, where the factor A trains. Fused layers keep the
  input itself for A's gradient; PEFT often keeps a copy that it cast or dropped out.
- Differentiating twice (`create_graph=True`). The backward is written by hand, once.
- Running the outputs of two siblings back one after the other without `retain_graph`. They are one node.

`pyfastlora.unpatch(model)` gives a model that does one of these its own forward back.

## Where PEFT's own tests see a difference

`make test-peft` runs PEFT's tests of LoRA with every model patched. What fails is run again unpatched, and
has to fail then too. Three sorts of tests may not, as they compare roundings, to 1e-6 or closer:

- `TestScalingAdapters` and `test_disable_adapter` of Llama 4 compare a first forward with a later one.
  The first finds out which siblings are fed one tensor, the later ones run them as one node, whose sums are
  added in another order. Logits up to 19 come out 6e-6 apart.
- `test_lora_use_dora_linear` compares DoRA with B = 0, (m / norm) W x + b, with W x + b, where the terms may
  cancel.
- `test_save_load_roundtrip_fsdp_wrapped` with `lora_bias` compares a model under FSDP1, where PEFT's forward
  runs, with the same one fused; it passes on some CPUs.

## Feed-forward blocks

A module whose forward is `down(act(gate(x)) * up(x))`, or the same with gate and up in one linear, runs as
one node. `patch` tells from a trace, not from the class; what else the forward has in it, a clamp, a factor,
a dropout, is named in the report. A block that was given other attributes since, or whose class another
forward, runs its own; what is changed inside an attribute, such as a config, does not show: patch after that.
At each call every linear in the block has to pass the conditions above,
with an adapter or, exactly `nn.Linear` or one of bitsandbytes', without one. Where one does not, the module's
own forward runs, its linears one by one, and the report says "mlp one by one" and why.

## 8-bit layers

`bitsandbytes.nn.Linear8bitLt` multiplies decoded weights while it trains on a CPU. In eval mode, and on a GPU
always, it quantises its input too; fused layers then leave that product to bitsandbytes' own ops and do the
rest: the adapter and all gradients. PEFT's 8-bit DoRA loses the weight's scales on a CPU and fails at its
second forward; fused layers keep them.

## 4-bit layers on a CPU

On CPUs with AVX512-BF16, `bitsandbytes.nn.Linear4bit` repacks its weight in place during the first forward
in eval mode, for an inference kernel without a backward. After that PEFT passes no gradient through the
layer, or raises, and DoRA and merging are wrong. `patch` switches the repacking off on every `Linear4bit`
of the model (`unpatch` gives the switch back) and undoes it where it has happened, with a warning: the
4-bit codes come back exactly, the block scales keep the rounding to bfloat16 that the repacking gave them.

Rows whose length is not a multiple of the blocksize are misread by bitsandbytes' AVX-512 kernel if the
length is a multiple of 16. Fused layers read them correctly and so differ from PEFT on such a CPU;
`patch(model, verify=True)` keeps them fused and says so. Layers that run PEFT's forward have bitsandbytes'
result.
"""


def markdown() -> str:
    """The whole page."""
    left = "".join(f"| {name} | {why} |\n" for name, why in conditions.LEFT_TO_PEFT.items())
    embeddings = _EMBEDDINGS + _TABLE + "".join(_rows(conditions_embedding))
    return _HEAD + _TABLE + "".join(_rows(conditions)) + embeddings + _LEFT + left + _TAIL


def _rows(module: ModuleType) -> Iterator[str]:
    # what it passes on from the weight formats
    extra = {"l12_base_weight": (dense.why_not, bnb_4bit.why_not, bnb_8bit.why_not)}
    for name, condition in vars(module).items():
        number = re.fullmatch(r"l(\d+)_\w+", name)
        if number is None:
            continue
        checked = (inspect.getdoc(condition) or "").partition("\n\n")[0].replace("\n", " ")
        sentences = [text for each in (condition, *extra.get(name, ())) for text in _sentences(each)]
        yield f"| L{number[1]} | {checked} | {'<br>'.join(dict.fromkeys(sentences))} |\n"


def _sentences(function: Callable[..., Any]) -> Iterator[str]:
    returns = [
        node for node in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(node, ast.Return)
    ]
    for node in sorted(returns, key=lambda node: node.lineno):
        found = node.value.body if isinstance(node.value, ast.IfExp) else node.value
        if isinstance(found, ast.Constant | ast.JoinedStr) and (text := _text(found)):
            yield text


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value or "")
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


if __name__ == "__main__":
    print(markdown(), end="")
