"""The report as a reader and a program see it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import pyfastlora
from pyfastlora.patching import PatchReport, Row

from .models import WIDTH, first, inputs, lora, row


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)}) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["up"](x)
        return x


def test_a_line_per_kind_of_module_and_a_summary() -> None:
    model = lora(Stack(), target_modules=["up"])
    pyfastlora.patch(model, backend="reference")
    model(inputs(2, WIDTH))
    model.base_model.model.layers[3]["up"].base_layer.register_forward_hook(lambda *_: None)
    text = str(pyfastlora.report(model)).splitlines()
    assert len(text) == 5
    assert text[2].split() == [
        "base_model.model.layers.*.up",
        "(11)",
        "Linear",
        "fused",
        "linear",
        "reference",
        "11",
        "0",
    ]
    assert text[3].startswith("base_model.model.layers.3.up ") and text[3].endswith(
        "a forward hook sits on base_layer"
    )
    assert text[4] == "fused 11 of 12 LoRA linears"
    assert len(pyfastlora.report(model).table(full=True).splitlines()) == 15


def test_columns_that_say_nothing_are_left_out() -> None:
    text = str(pyfastlora.patch(lora()))
    assert "error" not in text and "calls" not in text and "reason" not in text
    assert "error" in str(pyfastlora.patch(lora(), verify=True))


def test_counts_and_the_latest_reason() -> None:
    ours = lora()
    assert (pyfastlora.report(ours).fused, row(ours).reason) == (
        0,
        "not patched: call pyfastlora.patch(model)",
    )
    pyfastlora.patch(ours)
    x = inputs(2, WIDTH)
    ours(x)
    with ours.disable_adapter():
        ours(x)
        ours(x)
    found = row(ours)
    assert (found.calls_fused, found.calls_fallback, found.fused, found.region) == (1, 2, True, "linear")
    assert found.reason.startswith("adapters are disabled")


def test_a_layer_whose_every_call_fell_back_does_not_count_as_fused() -> None:
    ours = lora()
    pyfastlora.patch(ours)
    ours.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        ours(inputs(2, WIDTH))
    assert not row(ours).fused and "autocast is off" in row(ours).reason
    assert pyfastlora.report(ours)["down"].fused  # it was not reached


def test_json_and_look_up() -> None:
    report = pyfastlora.patch(lora())
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["fused"], data["total"]) == (2, 2)
    assert [Row(**each) for each in data["rows"]] == list(report)
    assert report["up"] is report["base_model.model.up"]
    with pytest.raises(KeyError, match="q_proj: 0 LoRA layers"):
        report["q_proj"]
    assert repr(report) == "<PatchReport: fused 2 of 2 LoRA linears>"


def test_other_layers_are_called_layers() -> None:
    rows = [Row("a", "Linear", True, "linear", "auto", ""), Row("b", "Embedding", False, "none", "", "why")]
    assert PatchReport(rows).summary() == "fused 1 of 2 LoRA layers"


def test_the_report_sees_an_adapter_added_after_patching() -> None:
    from peft import LoraConfig

    model = lora(target_modules=["up"])
    pyfastlora.patch(model)
    model.add_adapter("more", LoraConfig(target_modules=["up", "down"]))
    model.set_adapter("more")
    report = pyfastlora.report(model)
    assert report["up"].fused and report["down"].reason == "not patched: call pyfastlora.patch(model)"
    assert pyfastlora.patch(model).fused == 2
    first(model)(inputs(2, WIDTH))
    assert row(model).calls_fused == 1
