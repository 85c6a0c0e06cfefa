"""patch and unpatch: what they change, what they leave, and that the way back leads all the way back."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import DEVICE, assert_as_exact_on_average, error, implementations, process_group
from peft.tuners.lora import Linear
from torch import Tensor, nn

import pyfastlora
from pyfastlora.ops import BackendError, _registry, all_ops
from pyfastlora.patching import layers
from pyfastlora.patching.layers import FastLoraLinear

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
)


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Class and attributes of every module; parameters and buffers are the model's own objects."""
    return {
        name: (
            type(module),
            {key: value for key, value in module.__dict__.items() if not key.startswith("_p")},
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=["dense", "4-bit"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return lora(toy_4bit() if request.param == "4-bit" else None, lora_dropout=0.1)


def test_a_patched_layer_is_still_what_it_was(model: nn.Module) -> None:
    keys, shown, layer = list(model.state_dict()), repr(model), first(model)
    peft_class = type(layer)
    found = pyfastlora.patch(model)
    assert (found.fused, found.total) == (2, 2)
    assert first(model) is layer and isinstance(layer, peft_class)
    assert list(model.state_dict()) == keys
    assert "forward" not in layer.__dict__
    assert repr(model) == shown  # which PEFT's layer status reads
    kind = type(layer)
    assert getattr(importlib.import_module(kind.__module__), kind.__qualname__) is kind


def test_patching_twice_is_patching_once(model: nn.Module) -> None:
    pyfastlora.patch(model)
    model(inputs(3, WIDTH))
    before = snapshot(model)
    assert pyfastlora.patch(model).to_dict() == pyfastlora.report(model).to_dict()
    assert snapshot(model) == before
    assert row(model).calls_fused == 1


def test_unpatch_gives_everything_back(model: nn.Module) -> None:
    before, forward = snapshot(model), Linear.forward
    for _ in range(2):
        pyfastlora.patch(model, verify=True)
        model(inputs(3, WIDTH))
        pyfastlora.unpatch(model)
        assert snapshot(model) == before
    assert Linear.forward is forward
    pyfastlora.unpatch(model)  # nothing to do
    assert snapshot(model) == before
    assert row(model).reason == "not patched: call pyfastlora.patch(model)"


def test_another_model_of_the_same_class_is_unaffected() -> None:
    other = lora()
    before, expected = snapshot(other), other(inputs(3, WIDTH))
    pyfastlora.patch(lora())
    assert snapshot(other) == before
    assert torch.equal(other(inputs(3, WIDTH)), expected)


def test_deepcopy_is_independent(model: nn.Module) -> None:
    pyfastlora.patch(model, backend="reference")
    twin = copy.deepcopy(model)
    assert type(first(twin)) is type(first(model))
    twin(inputs(3, WIDTH))
    assert (row(twin).calls_fused, row(model).calls_fused) == (1, 0)
    assert row(twin).backend == "reference"
    with torch.no_grad():
        first(twin).lora_B["default"].weight.zero_()
    assert first(model).lora_B["default"].weight.any()
    pyfastlora.unpatch(twin)
    assert row(model).fused


def test_pickle_keeps_the_class_and_the_backend(model: nn.Module) -> None:
    pyfastlora.patch(model, backend="reference")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(first(twin)) is type(first(model))
        assert row(twin).backend == "reference"
        assert_close(step(twin, inputs(3, WIDTH)), step(model, inputs(3, WIDTH)))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_as_exact_as_peft(config: dict[str, Any], dtype: torch.dtype) -> None:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(4):
        peft = lora(**config).to(dtype)
        exact = copy.deepcopy(peft).double()
        ours = patched_copy(peft)
        x = inputs(16, WIDTH, dtype=dtype, seed=seed)
        layers_of = [first(each) for each in (ours, peft, exact)]
        mine, theirs, truth = (step(layer, x.to(layer.base_layer.weight.dtype)) for layer in layers_of)
        for name in truth:
            pairs.setdefault(name, []).append(
                (error(mine[name], truth[name]), error(theirs[name], truth[name]))
            )
        assert row(ours).calls_fused == 1
    for name, found in pairs.items():
        assert_as_exact_on_average(found, name)


# ---- backends
# -------------------------------------------------------------------------------------------------------


@pytest.fixture
def requests_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What was requested of the ops at each fused call."""
    seen: list[dict[str, str]] = []
    real = layers.fused_projections

    def spy(x: Tensor, projections: Any) -> list[Tensor]:
        seen.append(dict(_registry._requests))
        return real(x, projections)

    monkeypatch.setattr(layers, "fused_projections", spy)
    yield seen


def test_a_backend_holds_for_the_calls_of_that_model_only(requests_seen: list[dict[str, str]]) -> None:
    ours, other = patched_copy(lora(), backend="reference"), patched_copy(lora())
    first(ours)(inputs(3, WIDTH))
    first(other)(inputs(3, WIDTH))
    first(copy.deepcopy(ours))(inputs(3, WIDTH))
    assert requests_seen == [{"*": "reference"}, {}, {"*": "reference"}]
    pyfastlora.patch(ours, backend="lora_shrink=reference")
    first(ours)(inputs(3, WIDTH))
    with pyfastlora.backend("reference"):
        first(other)(inputs(3, WIDTH))  # "auto" obeys what is in force around the call
    assert requests_seen[3:] == [{"lora_shrink": "reference"}, {"*": "reference"}]
    assert (row(ours).backend, row(other).backend) == ("lora_shrink=reference", row(other).backend)


def test_the_report_names_what_auto_came_to() -> None:
    ours = patched_copy(lora())
    assert row(ours).backend == "auto"
    with pyfastlora.backend("reference"):
        ours(inputs(3, WIDTH))
        assert row(ours).backend == "reference"


def test_a_backend_that_does_not_exist_is_refused() -> None:
    model = lora()
    before = snapshot(model)
    with pytest.raises(ValueError, match="choose one of auto, gpu, triton, cpu, reference"):
        pyfastlora.patch(model, backend="cuda")
    assert snapshot(model) == before


def test_a_backend_that_cannot_run_here_is_refused_with_every_reason(model: nn.Module) -> None:
    before = snapshot(model)
    other = "gpu" if DEVICE.type == "cpu" else "cpu"
    said = rf"`{other}` was requested and cannot take {DEVICE.type}(.|\n)*reference  can"
    with pytest.raises(BackendError, match=said):
        pyfastlora.patch(model, backend=other)
    assert snapshot(model) == before


def test_a_backend_that_cannot_go_on_raises_at_the_call() -> None:
    """A model patched for one dtype and then cast to one that the backend does not have."""
    best = implementations("lora_shrink")[0]
    ours = patched_copy(lora(), backend=best)
    ours.double()
    with pytest.raises(BackendError, match=rf"{best} .*has float16, bfloat16, float32; this is float64"):
        ours(inputs(3, WIDTH, dtype=torch.float64))


@pytest.mark.own_device  # Dynamo does not get through a Params4bit under a default device (torch 2.13)
@pytest.mark.parametrize(
    "build", [Toy, toy_conv1d, toy_4bit, toy_8bit], ids=["dense", "conv1d", "4-bit", "8-bit"]
)
def test_a_layer_compiles_in_one_graph_before_it_ever_ran(build: Callable[[], nn.Module]) -> None:
    """No op has been picked by then, neither for the forward nor for the backward."""
    with DEVICE:
        ours = patched_copy(lora(build(), fan_in_fan_out=build is toy_conv1d))
    for op in all_ops():
        op._chosen.clear()
    torch._dynamo.reset()
    compiled = copy.deepcopy(ours)
    compiled.base_model.model.up = torch.compile(first(compiled), backend="aot_eager", fullgraph=True)
    mine, theirs = step(compiled, inputs(3, WIDTH)), step(ours, inputs(3, WIDTH))
    assert_close({name.replace("._orig_mod", ""): value for name, value in mine.items()}, theirs)


# ---- what else changes modules
# --------------------------------------------------------------------------------------


def test_not_a_module_and_not_a_peft_model() -> None:
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module; got dict"):
        pyfastlora.patch({})  # type: ignore[arg-type]
    found = pyfastlora.patch(Toy())
    assert (len(found), str(found)) == (0, "no LoRA layers: patch the model that get_peft_model() returned")


def test_data_parallel_replicas_run_their_own_tensors() -> None:
    """A replica holds plain tensors as attributes and an empty `_parameters`."""
    peft = lora()
    ours = patched_copy(peft)

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 2)
        return replica

    x = inputs(3, WIDTH)
    assert_close({"y": replicate(first(ours))(x)}, {"y": replicate(first(peft))(x)})
    assert row(ours).calls_fused == 1


def test_fsdp2_composes_and_unpatch_says_what_comes_first() -> None:
    """fully_shard swaps the class of what it wraps too, for a subclass made on the spot."""
    from torch.distributed.fsdp import fully_shard

    peft = lora(use_dora=True)
    with process_group() as mesh:
        ours = patched_copy(peft)
        fully_shard(first(ours), mesh=mesh)
        fully_shard(ours, mesh=mesh)
        mine, theirs = step(ours, inputs(3, WIDTH)), step(peft, inputs(3, WIDTH))
        assert_close({name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in mine.items()}, theirs)
        assert [(each.fused, each.calls_fused) for each in pyfastlora.report(ours)] == [(True, 1), (True, 1)]
        with pytest.raises(
            RuntimeError, match=r"up became a FSDPFastLoraLinear .*unpatch before fully_shard"
        ):
            pyfastlora.unpatch(ours)
        assert [isinstance(m, FastLoraLinear) for m in ours.modules() if isinstance(m, Linear)] == [
            True,
            True,
        ]


def test_functional_results_do_not_depend_on_the_report() -> None:
    """Reading the report between steps changes nothing."""
    peft = lora(lora_dropout=0.2)
    ours, watched = patched_copy(peft), patched_copy(peft)
    for seed in range(3):
        pyfastlora.report(watched)
        assert_equal(step(watched, inputs(4, WIDTH, seed=seed)), step(ours, inputs(4, WIDTH, seed=seed)))
