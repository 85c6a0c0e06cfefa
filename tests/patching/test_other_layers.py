"""PEFT's layers that are not fused: each is known by name and left as it is, and the report says why."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import peft.tuners.lora
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import pyfastlora
from pyfastlora.patching.conditions import FUSED_TYPES, LEFT_TO_PEFT

from .models import HIDDEN, WIDTH, inputs, lora, with_noise


class Zoo(nn.Module):
    """One module for each of PEFT's dense layers that have no fused region, and a linear beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.area, self.space = nn.Conv1d(4, 4, 3), nn.Conv2d(1, 2, 2), nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        along = self.line(x.reshape(1, 4, WIDTH)).sum() + self.area(x[None, None]).sum()
        return self.up(x) + along + self.space(x.reshape(1, 1, 4, 8, 8)).sum()


def test_dense_layers_without_a_region_are_untouched() -> None:
    names = ["line", "area", "space", "attention", "up"]
    model = lora(Zoo(), target_modules=names)
    x = inputs(4, WIDTH)
    expected = model(x)
    classes = {name: type(module) for name, module in model.named_modules()}
    found = pyfastlora.patch(model)
    assert [found[name].reason for name in names] == [
        "Conv1d is left to PEFT: convolutions have no fused region",
        "Conv2d is left to PEFT: convolutions have no fused region",
        "Conv3d is left to PEFT: convolutions have no fused region",
        "MultiheadAttention is left to PEFT: nn.MultiheadAttention multiplies with merged weights by itself",
        "",
    ]
    changed = [name for name, module in model.named_modules() if type(module) is not classes[name]]
    assert changed == ["base_model.model.attention.base_layer.out_proj", "base_model.model.up"]
    assert "the base layer is a NonDynamicallyQuantizableLinear" in found["out_proj"].reason  # never called
    torch.testing.assert_close(model(x), expected)
    assert (found.summary(), pyfastlora.report(model)["up"].calls_fused) == ("fused 1 of 6 LoRA layers", 1)


def test_adapters_on_parameters_and_adalora_are_untouched() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
            self.experts.forward = lambda x: x  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.experts.weight[0]

    adalora = get_peft_model(lora().unload(), AdaLoraConfig(target_modules=["up"], init_r=4, total_step=10))
    assert pyfastlora.patch(adalora)["up"].reason.startswith("SVDLinear is left to PEFT: AdaLoRA")
    experts = get_peft_model(Experts(), LoraConfig(target_modules=[], target_parameters=["experts.weight"]))
    reason = pyfastlora.patch(experts)["experts"].reason
    assert reason == "ParamWrapper is left to PEFT: its adapter is on a bare parameter (target_parameters)"


@pytest.mark.parametrize("name", [name for name in LEFT_TO_PEFT if name.endswith(("LoraLinear", "TeLinear"))])
def test_layers_of_other_libraries_are_untouched(name: str) -> None:
    """Stand-ins by PEFT's names: the libraries need not be there."""

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, nn.Linear(WIDTH, HIDDEN))

    kind = type(name, (nn.Module, LoraLayer), {"__init__": init, "__module__": "peft.tuners.lora.other"})
    model = nn.Sequential(kind())
    (row,) = pyfastlora.patch(model)
    assert (row.layer, row.fused, type(model[0])) == (name, False, kind)
    assert row.reason == f"{name} is left to PEFT: {LEFT_TO_PEFT[name]}"


def test_every_layer_of_this_peft_is_fused_or_named() -> None:
    known = {*LEFT_TO_PEFT, *(name for _, name in FUSED_TYPES)}
    known |= {"_ConvNd"}  # abstract
    sources = Path(peft.tuners.lora.__file__).parent.glob("*.py")
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    bases = {"LoraLayer", "_ConvNd", "Linear"}
    found = {
        node.name
        for node in nodes
        if isinstance(node, ast.ClassDef) and bases & {b.id for b in node.bases if isinstance(b, ast.Name)}
    }
    assert {"Linear", "Embedding", "Conv2d", "HqqLoraLinear"} <= found
    assert found <= known, f"new in PEFT: {sorted(found - known)}"


def test_a_layer_by_one_of_these_names_that_is_not_pefts() -> None:
    class Conv2d(type(lora().base_model.model.up)):  # type: ignore[misc]
        pass

    model = with_noise(lora())
    model.base_model.model.up.__class__ = Conv2d
    assert pyfastlora.patch(model)["up"].reason.startswith("Conv2d is not exactly PEFT's Linear")
