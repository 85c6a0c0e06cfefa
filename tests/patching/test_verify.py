"""verify=True: a layer that does not give what PEFT gives is left on PEFT, and nothing else is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import rng_state
from peft.tuners.lora import Linear
from torch import Tensor

import pyfastlora
from pyfastlora.patching import layers
from pyfastlora.patching.layers import FastLoraLinear
from pyfastlora.patching.verify import BOUNDS

from .models import WIDTH, first, inputs, lora, row, toy_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
}


def off_by(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fused result wrong by a factor on the adapter's part."""
    real = layers.fused_projections

    def wrong(x: Tensor, projections: Any) -> list[Tensor]:
        return real(x, [replace(p, scaling=p.scaling * factor) for p in projections])

    monkeypatch.setattr(layers, "fused_projections", wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_right_stays_fused(config: dict[str, Any], dtype: torch.dtype) -> None:
    model = lora(**config).to(dtype)
    for each in pyfastlora.patch(model, verify=True):
        assert each.fused and each.error is not None and each.error <= BOUNDS[dtype], each
        assert (each.note, each.calls_fused, each.calls_fallback) == ("", 0, 0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_4bit_stays_fused(config: dict[str, Any]) -> None:
    found = pyfastlora.patch(lora(toy_4bit(), **config), verify=True)
    assert [each.fused for each in found] == [True, True]
    assert all(each.error is not None and each.error < 1e-5 for each in found)


@pytest.mark.parametrize("factor", [0.0, 1.1, -1.0])
def test_what_is_wrong_is_left_on_peft(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    off_by(factor, monkeypatch)
    model = lora()
    found = pyfastlora.patch(model, verify=True)
    assert found.fused == 0
    assert type(first(model)) is Linear
    assert "off PEFT, above 2e-03" in found["up"].reason and found["up"].reason.startswith("verify: the ")
    assert found["up"].error is not None and found["up"].error > 0.01
    assert not pyfastlora.patch(model)["up"].fused  # it stays there
    pyfastlora.unpatch(model)
    monkeypatch.undo()
    assert pyfastlora.patch(model, verify=True).fused == 2


def test_a_wrong_gradient_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers.fused_projections

    def wrong(x: Tensor, projections: Any) -> list[Tensor]:
        (y,) = real(x, projections)
        y.register_hook(lambda grad: grad * 1.05)
        return [y]

    monkeypatch.setattr(layers, "fused_projections", wrong)
    assert "the gradient of" in pyfastlora.patch(lora(), verify=True)["up"].reason


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_generators_are_undisturbed(training: bool) -> None:
    model = lora(lora_dropout=0.3, bias="all").train(training)
    seen: list[str] = []
    first(model).register_forward_hook(lambda *_: seen.append("called"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(7)
    state = rng_state()
    with torch.no_grad(), torch.inference_mode():
        found = pyfastlora.patch(model, verify=True)
    assert found.fused == 2 and not seen
    assert torch.equal(rng_state(), state)
    assert all(module.training is training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_an_adapter_that_is_still_zero_is_said_to_be() -> None:
    model = lora()
    torch.nn.init.zeros_(first(model).lora_B["default"].weight)
    found = pyfastlora.patch(model, verify=True)
    assert found["up"].fused and found["up"].note == "the adapter is still zero (B = 0)"
    assert found["down"].note == ""


def test_layers_with_a_reason_are_not_probed() -> None:
    model = lora()
    first(model).base_layer.register_forward_hook(lambda *_: None)
    found = pyfastlora.patch(model, verify=True)
    assert (found["up"].error, found["up"].reason) == (None, "a forward hook sits on base_layer")
    assert found["down"].error is not None
    assert isinstance(first(model), FastLoraLinear)  # it runs fused again when the hook goes


def test_a_mode_that_rules_fused_calls_out_is_noted() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = lora()
    with Mode():
        pyfastlora.patch(model, verify=True)
    found = row(model)
    assert found.fused and found.error is None
    assert found.note == "not verified: Mode is active: it is to see PEFT's own operations"
    assert found.reason == "" and model(inputs(2, WIDTH)).shape == (2, WIDTH)
