"""What a PEFT user does with a model, done to a patched one: the same files, weights and numbers come out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

import pyfastlora

from .models import (
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
    toy_8bit,
    toy_conv1d,
    with_noise,
)

Build = Callable[[], nn.Module]
CASES: list[tuple[Build, dict[str, Any]]] = [
    (Toy, {}),
    (Toy, {"use_dora": True}),
    (Toy, {"bias": "lora_only", "use_rslora": True}),
    (toy_4bit, {}),
    (toy_4bit, {"use_dora": True}),
    (toy_8bit, {}),
    (toy_conv1d, {"fan_in_fan_out": True}),
    (toy_conv1d, {"fan_in_fan_out": True, "use_dora": True}),
]
IDS = ["lora", "dora", "rslora, bias", "4-bit lora", "4-bit dora", "8-bit lora", "conv1d lora", "conv1d dora"]


@pytest.fixture(params=CASES, ids=IDS)
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, PeftModel]:
    """(PEFT, ours): one model and its patched copy."""
    build, config = request.param
    peft = lora(build(), **config)
    return peft, patched_copy(peft)


def both(pair: tuple[PeftModel, PeftModel], act: Callable[[PeftModel], Any]) -> None:
    """Do the same to both, from the same random state, and let them compute the same."""
    for model in pair:
        torch.manual_seed(2)
        act(model)
    peft, ours = pair
    x = inputs(4, WIDTH)
    assert_close(step(ours, x), step(peft, x))


def base_of(layer: Any) -> torch.Tensor:
    weight = layer.base_layer.weight
    return weight if weight.is_floating_point() else weight.data


def content(file: Path) -> Any:
    """A config's fields, whose target modules PEFT keeps in a set, in any order; other files' bytes."""
    if file.suffix != ".json":
        return file.read_bytes()
    fields = json.loads(file.read_text(encoding="utf-8"))
    return fields | {"target_modules": sorted(fields["target_modules"])}


def test_save_and_load_both_ways(pair: tuple[PeftModel, PeftModel], tmp_path: Path) -> None:
    peft, ours = pair
    for name, model in (("peft", peft), ("ours", ours)):
        step(model, inputs(4, WIDTH))
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "peft").iterdir())
    for file in files:
        assert content(tmp_path / "ours" / file) == content(tmp_path / "peft" / file), file

    expected = get_peft_model_state_dict(peft)
    base = copy.deepcopy(ours).unload()
    pyfastlora.unpatch(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True)
    assert_equal(get_peft_model_state_dict(loaded), expected)
    assert pyfastlora.patch(loaded).fused == 2
    x = inputs(4, WIDTH)
    assert_close(step(loaded, x), step(peft, x))
    if peft.peft_config["default"].bias != "none":
        return  # PEFT allows one adapter where it trains the base's biases
    ours.load_adapter(tmp_path / "peft", "again")
    ours.set_adapter("again")
    ours.train()  # loading ended training, in which an 8-bit layer quantises x too
    assert_close({"y": ours(x)}, {"y": peft(x)})
    assert row(ours).calls_fallback == 0


def test_state_dicts_are_interchangeable(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    assert_equal(ours.state_dict(), peft.state_dict())
    for source, target in ((peft, ours), (ours, peft)):
        with_noise(source)
        set_peft_model_state_dict(target, get_peft_model_state_dict(source))
        both(pair, lambda model: None)
    assert row(ours).calls_fused == 2


def test_merge_and_unload(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    merged = [model.merge_and_unload() for model in (peft, ours)]
    assert_equal(merged[1].state_dict(), merged[0].state_dict())
    assert [type(module) for module in merged[1].modules()] == [
        type(module) for module in merged[0].modules()
    ]
    x = inputs(4, WIDTH)
    assert torch.equal(merged[1](x), merged[0](x))


def test_unload(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    plain = [model.unload() for model in (peft, ours)]
    assert_equal(plain[1].state_dict(), plain[0].state_dict())
    pyfastlora.unpatch(plain[1])  # of the 4-bit layers the switch alone is left to give back
    for mine, theirs in zip(plain[1].modules(), plain[0].modules(), strict=True):
        assert type(mine) is type(theirs) and mine.__dict__.keys() == theirs.__dict__.keys()


def test_merge_unmerge_train(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    both(pair, lambda model: None)
    x = inputs(4, WIDTH)
    for model in pair:
        model.merge_adapter()
    assert torch.equal(base_of(first(ours)), base_of(first(peft)))
    assert torch.equal(ours(x), peft(x))
    assert row(ours).reason == "merged (default): call unmerge_adapter() to train"
    both(pair, lambda model: model.unmerge_adapter())
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (2, 1)


def test_add_switch_and_delete_adapters(pair: tuple[PeftModel, PeftModel]) -> None:
    _, ours = pair
    config = LoraConfig(r=4, lora_alpha=2, lora_dropout=0.2, target_modules=["up", "down"])
    both(pair, lambda model: with_noise(model) if model.add_adapter("second", config) is None else model)
    both(pair, lambda model: model.set_adapter("second"))
    assert row(ours).calls_fallback == 0
    both(pair, lambda model: model.base_model.set_adapter(["default", "second"]))
    assert "2 active adapters (default, second)" in row(ours).reason
    both(pair, lambda model: model.set_adapter("default"))
    both(pair, lambda model: model.delete_adapter("second"))
    assert list(first(ours).lora_A) == ["default"]
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (4, 1)


def test_disable_adapter_and_back(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    x = inputs(4, WIDTH)
    with peft.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), peft(x))
    both(pair, lambda model: None)
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (1, 1)


def test_scaling_and_dropout_changed_on_the_way(pair: tuple[PeftModel, PeftModel]) -> None:
    _, ours = pair
    both(pair, lambda model: first(model).scale_layer(1.7))
    both(pair, lambda model: first(model).lora_dropout.update({"default": nn.Dropout(0.4)}))
    both(pair, lambda model: model.eval())
    both(pair, lambda model: model.train())
    both(pair, lambda model: first(model).unscale_layer())
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (5, 0)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_layer_in_another_mode_than_its_dropout(config: dict[str, Any]) -> None:
    """Plain LoRA asks the dropout alone, DoRA the layer first."""
    peft = lora(lora_dropout=0.4, **config)
    pair = (peft, patched_copy(peft))
    for layer_trains, dropout_trains in ((False, True), (True, False)):

        def modes(model: PeftModel, own: bool = layer_trains, inner: bool = dropout_trains) -> None:
            first(model).training = own
            first(model).lora_dropout["default"].training = inner

        both(pair, modes)
    assert row(pair[1]).calls_fused == 2


def test_weighted_combination_of_adapters() -> None:
    peft = lora()
    pair = (peft, patched_copy(peft))
    config = LoraConfig(r=4, target_modules=["up", "down"])

    def combine(model: PeftModel) -> None:
        model.add_adapter("second", config)
        with_noise(model)
        model.add_weighted_adapter(["default", "second"], [0.6, 0.4], "mixed", combination_type="cat")
        model.set_adapter("mixed")

    both(pair, combine)
    assert row(pair[1]).calls_fused == 1


def test_modules_to_save_train_beside_fused_layers() -> None:
    peft = lora(target_modules=["up"], modules_to_save=["down"])
    pair = (peft, patched_copy(peft))
    both(pair, lambda model: None)
    assert "base_model.model.down.modules_to_save.default.weight" in step(pair[1], inputs(4, WIDTH))
