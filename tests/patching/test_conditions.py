"""L1 to L15: whatever rules a call out, PEFT's own result comes, bit for bit, and the report says why.

Every case does one thing to a PEFT model and to a patched copy of it. The copy would run fused without that
thing (the first test), so a condition that is not checked shows as a fused call here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import nn

import pyfastlora

from .models import (
    HIDDEN,
    WIDTH,
    Toy,
    assert_close,
    assert_equal,
    first,
    inputs,
    lora,
    patched_copy,
    row,
    step,
    toy_4bit,
    toy_conv1d,
    with_noise,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True},
    "base bias": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("config", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("build", [Toy, toy_4bit, toy_conv1d], ids=["dense", "4-bit", "conv1d"])
def test_runs_fused_when_nothing_is_in_the_way(
    config: dict[str, Any], build: Callable[[], nn.Module]
) -> None:
    peft = lora(build(), fan_in_fan_out=build is toy_conv1d, **config)
    ours = patched_copy(peft)
    x = inputs(3, 5, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    for each in pyfastlora.report(ours):
        assert (each.fused, each.reason, each.calls_fused, each.calls_fallback) == (True, "", 1, 0)


Act = Callable[[nn.Module], AbstractContextManager[Any] | None]


def _hook(kind: str, child: str) -> Act:
    def act(model: nn.Module) -> None:
        module = first(model).get_submodule(child)
        getattr(module, kind)(lambda *_: None)

    return act


def _replaced_forward(child: str) -> Act:
    def act(model: nn.Module) -> None:
        module = first(model).get_submodule(child)
        module.forward = functools.partial(type(module).forward, module)

    return act


def _second_adapter(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"]))
    with_noise(model)
    model.base_model.set_adapter(["default", "other"])


def _adapter_elsewhere(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["down"]))
    model.set_adapter("other")


class _OtherLinear(nn.Linear):
    pass


class _OtherParameter(nn.Parameter):
    pass


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _other_base(model: nn.Module) -> None:
    first(model).base_layer.__class__ = _OtherLinear


def _trainable_base(model: nn.Module) -> None:
    first(model).base_layer.weight.requires_grad_()


def _biased_lora_a(model: nn.Module) -> None:
    torch.manual_seed(9)
    first(model).lora_A["default"] = nn.Linear(WIDTH, 8, bias=True)


def _lora_bias(model: nn.Module) -> None:
    """PEFT's config refuses this together with DoRA; a layer built by hand can have it."""
    first(model).lora_B["default"].bias = nn.Parameter(inputs(HIDDEN, seed=4))


def _parametrised_lora_a(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(first(model).lora_A["default"])


@contextmanager
def _global_hook(model: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def _cast_adapter(dtype: torch.dtype, *children: str) -> Act:
    def act(model: nn.Module) -> None:
        for child in children:
            first(model).get_submodule(child).to(dtype)

    return act


@contextmanager
def _autocast_without_casting(model: nn.Module) -> Iterator[None]:
    _cast_adapter(torch.bfloat16, "lora_A", "lora_B")(model)
    with disable_input_dtype_casting(model), torch.autocast(DEVICE.type, torch.bfloat16):
        yield


@contextmanager
def _autocast_with_a_float64_adapter(model: nn.Module) -> Iterator[None]:
    _cast_adapter(torch.float64, "lora_A", "lora_B")(model)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        yield


def _of_class(kind: type) -> Act:
    def act(model: nn.Module) -> None:
        base = first(model).base_layer
        base.weight = kind(base.weight.data, requires_grad=False)

    return act


def _attribute(name: str, value: Any) -> Act:
    return lambda model: setattr(first(model), name, value)


def _item(of: str, value: Callable[[], Any]) -> Act:
    return lambda model: getattr(first(model), of).update({"default": value()})


DORA = {"use_dora": True}
FORWARD, BACKWARD = "register_forward_hook", "register_full_backward_hook"
CASES: list[tuple[str, dict[str, Any], Act | None, str]] = [
    ("L3", {}, lambda model: model.disable_adapter(), r"adapters are disabled: leave disable_adapter\(\)"),
    ("L3", {}, lambda model: model.merge_adapter(), r"merged \(default\): call unmerge_adapter\(\)"),
    ("L4", {}, _second_adapter, r"2 active adapters \(default, other\)"),
    ("L4", {}, _adapter_elsewhere, "no active adapter on this layer; it has default"),
    ("L5", {"alora_invocation_tokens": [1]}, None, "ALoraLinearVariant is left to PEFT"),
    ("L5", {"init_lora_weights": "mica"}, None, "MiCALinearVariant is left to PEFT"),
    ("L5", DORA, _lora_bias, "DoRA with lora_bias"),
    ("L5", DORA, _attribute("ephemeral_gpu_offload", True), "ephemeral_gpu_offload moves weights"),
    ("L6", {}, _other_base, "the base layer is a _OtherLinear, not Linear"),
    ("L6", {}, _biased_lora_a, "lora_A has a bias"),
    ("L6", {}, _parametrised_lora_a, "lora_A is a ParametrizedLinear"),
    ("L6", {}, _attribute("fan_in_fan_out", True), "fan_in_fan_out is True over a Linear"),
    ("L7", {}, _item("lora_dropout", lambda: nn.AlphaDropout(0.3)), "dropout is AlphaDropout; fused are"),
    ("L7", {}, _item("lora_dropout", lambda: nn.Dropout(1.0)), "dropout p=1.0 keeps nothing"),
    ("L8", {}, _autocast_without_casting, "input casting is disabled: x is float32, the adapter bfloat16"),
    ("L8", {}, _cast_adapter(torch.float64, "lora_A", "lora_B"), "float64 is fused with itself only"),
    ("L8", DORA, _cast_adapter(torch.float64, "lora_magnitude_vector"), "lora_magnitude_vector.weight is"),
    ("L9", {}, _autocast_with_a_float64_adapter, "lora_A.weight is float64, which autocast leaves"),
    ("L10", {}, _hook(FORWARD, "base_layer"), "a forward hook sits on base_layer"),
    ("L10", {}, _hook("register_forward_pre_hook", "lora_A.default"), "a forward hook sits on lora_A"),
    ("L10", {}, _hook(BACKWARD, "lora_B.default"), "a backward hook sits on lora_B"),
    ("L10", {}, _hook("register_full_backward_pre_hook", "lora_dropout.default"), "sits on lora_dropout"),
    ("L10", DORA, _hook(FORWARD, "lora_magnitude_vector.default"), "sits on lora_magnitude_vector"),
    ("L10", {}, _replaced_forward("base_layer"), "forward was replaced on base_layer by a partial"),
    ("L10", {}, _global_hook, "global module hooks are registered"),
    ("L11", {}, _trainable_base, "base_layer.weight requires grad"),
    ("L11", {}, _of_class(_OtherParameter), "base_layer.weight is a _OtherParameter"),
    ("L13", {}, _item("scaling", lambda: torch.tensor(2.0)), "scaling is a Tensor, not a Python number"),
    ("L13", {}, _item("r", lambda: 0), "rank is 0"),
    ("L14", {}, lambda model: _DispatchMode(), "_DispatchMode is active: it is to see PEFT's own operations"),
    ("L14", {}, lambda model: _FunctionMode(), "_FunctionMode is active: it is to see PEFT's own operations"),
]


@pytest.mark.parametrize("late", [False, True], ids=["before patch", "after patch"])
@pytest.mark.parametrize(
    ("config", "act", "reason"),
    [case[1:] for case in CASES],
    ids=[f"{case[0]}-{case[3][:40]}" for case in CASES],
)
def test_peft_itself_runs_and_the_report_says_why(
    config: dict[str, Any], act: Act | None, reason: str, late: bool
) -> None:
    peft = lora(**config)
    ours = copy.deepcopy(peft)
    x = inputs(4, WIDTH)
    results = []
    for model in (peft, ours):
        if model is ours and late:
            pyfastlora.patch(model)
        around = act(model) if act else None
        if model is ours and not late:
            pyfastlora.patch(model)
        with around or contextlib.nullcontext():
            results.append(step(first(model), x))
    assert_equal(results[1], results[0])
    found = row(ours)
    assert (found.calls_fused, found.calls_fallback, found.fused, found.region) == (0, 1, False, "none")
    assert re.search(reason, found.reason), found.reason
    assert len(found.reason) <= 110


def test_reasons_come_and_go_with_the_state() -> None:
    """Nothing is decided once: the same layers run fused, PEFT and fused again as the model changes."""
    peft = lora()
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    acts: list[Callable[[nn.Module], Any]] = [
        lambda m: None,
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: first(m).set_scale("default", 3.0),
        lambda m: m.to(torch.float64),
    ]
    for act in acts:
        for model in (peft, ours):
            act(model)
        x = x.to(first(ours).base_layer.weight.dtype)
        assert_close({"y": ours(x)}, {"y": peft(x)})
    assert (row(ours).calls_fused, row(ours).calls_fallback, row(ours).fused) == (5, 2, True)
    assert "adapters are disabled" in row(ours).reason  # the latest one, kept for the reader of the report


def test_conditions_leave_the_model_as_it_was() -> None:
    model = lora(toy_4bit(), lora_dropout=0.2)
    before = copy.deepcopy(model.state_dict())
    ours = patched_copy(model)
    step(ours, inputs(3, WIDTH))
    assert_equal(ours.state_dict(), before)
