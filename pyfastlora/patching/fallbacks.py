"""Writes docs/fallbacks.md: `python -m pyfastlora.patching.fallbacks > docs/fallbacks.md`.

The table is read off the functions of `conditions.py`: the first sentence of a docstring says what is
checked, the strings that it returns are what a user reads. So neither can be forgotten when a condition
changes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from pyfastlora.patching import conditions
from pyfastlora.weights import bnb_4bit, dense

_HEAD = """\
# When PEFT's own forward runs

Every call of a patched layer checks the conditions below, on what the modules hold at that moment. Where
one does not hold, PEFT's own forward runs, and `pyfastlora.report(model)` shows the sentence on the right
(`…` stands for what was seen). Nothing is decided for good: when the cause goes, the next call runs fused.

L1 is checked by `patch`: a layer that fails it keeps its class. This page is made from the functions in
`pyfastlora/patching/conditions.py` by `python -m pyfastlora.patching.fallbacks > docs/fallbacks.md`.

| | what is checked | what the report says |
|---|---|---|
"""

_TAIL = """
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
    return _HEAD + "".join(_rows()) + _TAIL


def _rows() -> Iterator[str]:
    extra = {
        "l12_base_weight": (dense.why_not, bnb_4bit.why_not)
    }  # what it passes on from the weight formats
    for name, condition in vars(conditions).items():
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
