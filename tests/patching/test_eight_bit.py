"""8-bit layers: where bitsandbytes multiplies in float and where in integers, and the scales that wander."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor, nn

import pyfastlora
from pyfastlora.patching import verify
from pyfastlora.weights.bnb_8bit import Bnb8bitWeight

from . import models
from .models import (
    CLOSE,
    HIDDEN,
    WIDTH,
    difference,
    first,
    inputs,
    lora,
    patched_copy,
    row,
    step,
    toy_8bit,
)

bnb = pytest.importorskip("bitsandbytes")
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
}


def assert_close(
    ours: dict[str, Tensor], peft: dict[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """As of all models, but on a GPU bitsandbytes rounds float32 outputs to float16, the bias inside."""
    coarse = DEVICE.type != "cpu" and dtype is torch.float32
    models.assert_close(ours, peft, dtype=torch.float16 if coarse else dtype)


def settled(model: nn.Module) -> nn.Module:
    """With the scales where the first forward moves them, so that PEFT's DoRA survives one forward more."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt) and module.weight.CB is not None:
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            module.init_8bit_state()
            module.state.SCB = scales
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("training", [True, False], ids=["float", "integers"])
@pytest.mark.parametrize("threshold", [0.0, 1.5], ids=["", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_products_are_bitsandbytes(
    config: dict[str, Any], training: bool, threshold: float, dtype: torch.dtype
) -> None:
    """In eval mode PEFT's gradients flow too: what a GPU does in training."""
    peft = settled(lora(toy_8bit(threshold=threshold), **config)).train(training)
    ours = patched_copy(peft)
    x = inputs(3, 5, WIDTH, dtype=dtype)
    mine, theirs = step(first(ours), x), step(first(peft), x)
    assert_close(mine, theirs, dtype=dtype)
    assert (row(ours).calls_fused, row(ours).reason) == (1, "")
    if not training and DEVICE.type == "cpu":  # the quantised x shows: decoded products would not pass for it
        settled(ours)
        decoded = step(first(ours.train()), x) if not config.get("lora_dropout") else None
        assert decoded is None or difference(decoded["output"], theirs["output"]) > 2 * CLOSE[torch.float32]


def test_x_is_not_touched_while_outliers_are_kept_apart() -> None:
    ours = patched_copy(lora(toy_8bit(threshold=0.5))).eval()
    x = inputs(4, WIDTH, dtype=torch.float16)
    before, version = x.clone(), x._version
    first(ours)(x)
    assert torch.equal(x, before) and x._version == version
    assert row(ours).calls_fused == 1


def test_empty_batches_and_other_shapes() -> None:
    peft = lora(toy_8bit())
    ours = patched_copy(peft)
    for training in (True, False):
        for x in (inputs(1, WIDTH), inputs(2, 3, WIDTH)):
            assert_close({"y": first(ours.train(training))(x)}, {"y": first(peft.train(training))(x)})
        empty = step(first(ours), inputs(0, 3, WIDTH))
        assert empty["output"].shape == (0, 3, HIDDEN) and empty["x"].shape == (0, 3, WIDTH)
    assert row(ours).calls_fallback == 0


def test_evaluations_in_between_and_adapters_off() -> None:
    """The state of bitsandbytes' layer is read at every call, and left as its own forward leaves it."""
    peft = lora(toy_8bit())
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    for act in (
        lambda model: model,
        lambda model: model.eval(),
        lambda model: model.train(),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.to(DEVICE),
    ):
        for model in (peft, ours):
            act(model)
        assert_close(step(ours, x), step(peft, x))
        states = [
            {key: value for key, value in vars(first(model).base_layer.state).items() if key != "idx"}
            for model in (ours, peft)
        ]
        assert states[0].keys() == states[1].keys()
        assert all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(*map(dict.values, states), strict=True)
        )
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (6, 2)


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = toy_8bit().up, toy_8bit().up
        self.is_loaded_in_8bit = True

    turns_down = False

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.turns_down:
            self.down.eval()
        return up * self.down(x).sigmoid()


def test_siblings_run_as_one_node() -> None:
    peft = lora(Siblings())
    ours = patched_copy(peft)
    for training in (True, True, False, True):
        for model in (peft, ours):
            model.train(training)
        assert_close(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))
    assert row(ours).region == "group up, down" and row(ours).calls_fused == 4


@pytest.mark.cpu_only("a GPU quantises x in training, too")
def test_a_sibling_whose_mode_changes_in_between_computes_again() -> None:
    peft = lora(Siblings())
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    ours(x), ours(x)
    outputs = []
    for model in (ours, peft):
        model.base_model.model.turns_down = True
        outputs.append(model(x))
    assert difference(*outputs) <= CLOSE[torch.float32]
    assert row(ours).note.endswith("grouped no more: down changed after it was computed with the others")


@pytest.mark.cpu_only("PEFT moves the weight about on CPUs alone")
def test_dora_keeps_the_scales_that_peft_loses() -> None:
    peft = lora(toy_8bit(), use_dora=True)
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    expected = step(peft, x)
    for _ in range(3):
        assert_close(step(ours, x), expected)
    rescued = patched_copy(peft)  # after the forward that loses them and before the one that misses them
    for twin in (rescued, copy.deepcopy(ours)):
        assert_close(step(twin, x), expected)
        assert row(twin).calls_fallback == 0
    with pytest.raises(AttributeError, match="NoneType"):
        step(peft, x)


def test_pickle_makes_a_plain_parameter() -> None:
    peft = lora(toy_8bit())
    step(peft, inputs(3, WIDTH))
    again = pickle.loads(pickle.dumps(patched_copy(peft)))
    assert type(first(again).base_layer.weight) is nn.Parameter
    assert_close(step(again, inputs(3, WIDTH)), step(peft, inputs(3, WIDTH)))
    assert row(again).calls_fused == 1
    dora = pickle.loads(pickle.dumps(patched_copy(lora(toy_8bit(), use_dora=True))))
    assert row(dora).reason == "DoRA over a Parameter: PEFT decodes only a Int8Params"


def test_under_autocast() -> None:
    peft = lora(toy_8bit())
    ours = patched_copy(peft)
    for training, dtype, fused in (
        (True, torch.float32, DEVICE.type == "cpu"),  # a GPU quantises x in training, too
        (True, torch.bfloat16, True),
        (False, torch.bfloat16, True),
        (False, torch.float32, False),
    ):
        before = row(ours).calls_fused
        with torch.autocast(DEVICE.type, torch.bfloat16):
            x = inputs(4, WIDTH, dtype=dtype)
            mine, theirs = step(first(ours.train(training)), x), step(first(peft.train(training)), x)
        assert_close(mine, theirs, dtype=torch.bfloat16)
        assert row(ours).calls_fused == before + fused
    assert row(ours).reason.startswith("x is float32 under autocast: the 8-bit output's dtype would depend")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda base: setattr(base.state, "has_fp16_weights", True), "keeps its weight in float"),
        (lambda base: setattr(base.state, "SCB", None), "the 8-bit weight has no scales"),
        (lambda base: setattr(base.state, "SCB", base.state.SCB[:5]), r"\[128, 64\] has \[5\] scales"),
    ],
    ids=["float weights", "no scales", "other scales"],
)
def test_states_that_cannot_be_read(spoil: Any, reason: str) -> None:
    ours = patched_copy(settled(lora(toy_8bit())))
    spoil(first(ours).base_layer)
    found = row(ours)
    assert not found.fused
    assert re.search(reason, found.reason), found.reason


def test_a_weight_that_is_not_quantised_yet() -> None:
    base = toy_8bit()
    with torch.device("cpu"):
        base.up = bnb.nn.Linear8bitLt(WIDTH, HIDDEN, has_fp16_weights=False)
    model = lora(base)
    pyfastlora.patch(model)
    assert row(model).reason == "the 8-bit weight is not quantised yet: move the model to its device first"
    model.to(DEVICE)
    assert row(model).fused


def test_verify_leaves_the_bias_in_its_dtype() -> None:
    model = lora(toy_8bit())
    first(model).base_layer.bias.data = first(model).base_layer.bias.data.half()
    found = pyfastlora.patch(model, verify=True)
    assert found.fused == 2 and all(each.error is not None and each.error < 1e-2 for each in found)
    assert first(model).base_layer.bias.dtype is torch.float16
    assert verify.probe_dtype(model.base_model.model.down) is torch.float32
    assert pyfastlora.report(model).summary() == "fused 2 of 2 LoRA linears"


@pytest.mark.cpu_only("panels are how a CPU keeps W in its caches")
def test_panels_cover_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfastlora.ops import _panels

    base = first(settled(lora(toy_8bit()))).base_layer
    weight = Bnb8bitWeight.of(base.weight, base.state, training=True)
    exact = base.state.CB.double() * base.state.SCB.double()[:, None] / 127
    x, dy = inputs(7, WIDTH), inputs(7, HIDDEN, seed=4)
    a, b = inputs(3, WIDTH, seed=5), inputs(HIDDEN, 3, seed=6)
    monkeypatch.setattr(_panels, "PANEL_BYTES", 1)  # 64 rows or columns a panel
    expected = {
        "linear": x.double() @ exact.t(),
        "input_grad": dy.double() @ exact,
        "norm": (exact + 0.5 * b.double() @ a.double()).norm(dim=1),
    }
    ours = {"linear": weight.linear(x), "input_grad": weight.input_grad(dy), "norm": weight.norm(a, b, 0.5)}
    for name, value in expected.items():
        assert difference(ours[name], value) < 1e-6, name
    onto = weight.linear(x, onto=x.new_ones(7, HIDDEN)), weight.input_grad(dy, x.new_ones(7, WIDTH))
    for name, sum_ in zip(("linear", "input_grad"), onto, strict=True):
        assert difference(sum_, expected[name] + 1) < 1e-6, name
