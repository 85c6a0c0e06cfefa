"""Patched embeddings: what a PEFT user does with them, and whatever rules a call out."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import DEVICE, process_group
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.helpers import DoraCaching
from torch import Tensor, nn

import pyfastlora
from pyfastlora.patching.layers_embedding import FastLoraEmbedding

from .models import WIDTH, assert_close, assert_equal, lora, patched_copy, row, with_noise

ENTRIES = 31


class Words(nn.Module):
    """An embedding, named as what most tests of linears look at, and a head that shares its weight."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Embedding(ENTRIES, WIDTH, **settings)
        self.head = nn.Linear(WIDTH, ENTRIES, bias=False)
        self.head.weight = self.up.weight

    def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        return self.head(torch.tanh(self.up(tokens, **kwargs)))


class Scaled(nn.Embedding):
    """As some models have it."""

    embed_scale = 8.0

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
}


def words(base: dict[str, Any] | None = None, **config: Any) -> PeftModel:
    return lora(Words(**(base or {})).to(DEVICE), target_modules=["up"], **config)


def first(model: nn.Module) -> Any:
    return model.base_model.model.up


def tokens() -> Tensor:
    return torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 0]], device=DEVICE)


def step(model: nn.Module, x: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(tokens() if x is None else x, **kwargs)
    torch.manual_seed(6)
    if y.requires_grad:  # a merged adapter gets no gradient
        y.backward(torch.randn(y.shape, device=y.device).to(y.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **gradients}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[PeftModel, PeftModel]:
    peft = words({"padding_idx": 4}, **request.param)
    return peft, patched_copy(peft)


def both(pair: tuple[PeftModel, PeftModel], act: Callable[[PeftModel], Any]) -> None:
    for model in pair:
        torch.manual_seed(2)
        act(model)
    assert_close(step(pair[1]), step(pair[0]))


def test_runs_fused_and_reversibly(pair: tuple[PeftModel, PeftModel]) -> None:
    peft, ours = pair
    assert type(first(ours)) is FastLoraEmbedding and first(ours).base_layer.weight is first_head(ours).weight
    both(pair, lambda model: None)
    found = row(ours)
    assert (found.layer, found.fused, found.region, found.reason) == ("Embedding", True, "embedding", "")
    assert (found.calls_fused, found.calls_fallback) == (1, 0)
    assert pyfastlora.report(ours).summary() == "fused 1 of 1 LoRA layers"
    pyfastlora.unpatch(ours)
    assert (
        type(first(ours)) is type(first(peft)) and first(ours).__dict__.keys() == first(peft).__dict__.keys()
    )


def test_its_output_may_be_written_to(pair: tuple[PeftModel, PeftModel]) -> None:
    """Some models do: CSM puts the audio's embedding in the place of the first token's."""
    results = []
    for model in pair:
        model.zero_grad(set_to_none=True)
        y = first(model)(tokens())
        y[:, 0] = 1
        y.mul_(2).sum().backward()
        results.append((y, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*results)


def first_head(model: nn.Module) -> Any:
    return model.base_model.model.head


def test_save_load_merge_unmerge_switch_and_disable(
    pair: tuple[PeftModel, PeftModel], tmp_path: Path
) -> None:
    peft, ours = pair
    assert_equal(ours.state_dict(), peft.state_dict())
    ours.save_pretrained(tmp_path)
    base = copy.deepcopy(ours).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(peft))
    assert pyfastlora.patch(loaded).fused == 1
    assert_close(step(loaded), step(peft))

    both(pair, lambda model: model.merge_adapter())
    assert row(ours).reason == "merged (default): call unmerge_adapter() to train"
    both(pair, lambda model: model.unmerge_adapter())
    config = LoraConfig(r=3, target_modules=["up"])
    both(pair, lambda model: with_noise(model) if model.add_adapter("second", config) is None else model)
    both(pair, lambda model: model.set_adapter("second"))
    both(pair, lambda model: model.base_model.set_adapter(["default", "second"]))
    assert "2 active adapters (default, second)" in row(ours).reason
    both(pair, lambda model: model.set_adapter("default"))
    both(pair, lambda model: first(model).scale_layer(1.7))
    with peft.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(tokens()), peft(tokens()))
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (5, 3)
    merged = [model.merge_and_unload() for model in pair]
    assert_equal(merged[1].state_dict(), merged[0].state_dict())
    assert type(merged[1].up) is nn.Embedding


def test_deepcopy_and_pickle(pair: tuple[PeftModel, PeftModel]) -> None:
    ours = pair[1]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(first(twin)) is FastLoraEmbedding
        assert_equal(step(twin), step(ours))
        assert row(twin).calls_fused > 0 and row(twin).calls_fallback == 0


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_inside_a_checkpoint(pair: tuple[PeftModel, PeftModel], reentrant: bool) -> None:
    results = []
    for model in pair:
        x = torch.zeros(1, device=DEVICE, requires_grad=True)  # a reentrant checkpoint wants such an input
        inner = torch.utils.checkpoint.checkpoint(
            lambda x, model=model: model(tokens()) + x, x, use_reentrant=reentrant
        )
        model.zero_grad(set_to_none=True)
        inner.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(results[1], results[0])
    assert row(pair[1]).calls_fused == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_verify(pair: tuple[PeftModel, PeftModel], dtype: torch.dtype) -> None:
    model = copy.deepcopy(pair[0]).to(dtype)
    found = pyfastlora.patch(model, verify=True)["up"]
    assert found.fused and found.error is not None and found.note == ""
    nn.init.zeros_(first(model).lora_embedding_A["default"])
    pyfastlora.unpatch(model)
    assert pyfastlora.patch(model, verify=True)["up"].note == "the adapter is still zero (A = 0)"


def test_verify_finds_a_gradient_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfastlora.fused import embedding

    real = embedding._scatter
    monkeypatch.setattr(embedding, "_scatter", lambda *args: real(*args).roll(1, dims=1))
    found = pyfastlora.patch(words(), verify=True)["up"]
    assert not found.fused and "the gradient of lora_embedding_A is" in found.reason


def test_a_backend_holds_for_embeddings() -> None:
    ours = patched_copy(words(), backend="reference")
    step(ours)
    assert row(ours).backend == "reference"


def test_data_parallel_replicas_run_their_own_tensors(pair: tuple[PeftModel, PeftModel]) -> None:
    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        return replica

    peft, ours = pair
    assert_close({"y": replicate(first(ours))(tokens())}, {"y": replicate(first(peft))(tokens())})
    assert row(ours).calls_fused == 1


def test_fsdp2_shards_and_gathers_it(pair: tuple[PeftModel, PeftModel]) -> None:
    from torch.distributed.fsdp import fully_shard

    peft, ours = pair
    with process_group() as mesh:
        fully_shard([first(ours), first_head(ours)], mesh=mesh)  # they share a weight
        fully_shard(ours, mesh=mesh)
        mine, theirs = step(ours), step(peft)
        assert_close({name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in mine.items()}, theirs)
        assert (row(ours).fused, row(ours).calls_fused) == (True, 1)


# ---- what rules a call out
# --------------------------------------------------------------------------------------------------


def _base(kind: type) -> Callable[[PeftModel], None]:
    return lambda model: setattr(first(model).base_layer, "__class__", kind)


def _trainable(model: PeftModel) -> None:
    first(model).base_layer.weight.requires_grad_()


def _attribute(name: str, value: Any) -> Callable[[PeftModel], None]:
    return lambda model: setattr(first(model).base_layer, name, value)


def _hook(model: PeftModel) -> None:
    first(model).base_layer.register_forward_hook(lambda *_: None)


def _cast(name: str, dtype: torch.dtype) -> Callable[[PeftModel], None]:
    def act(model: PeftModel) -> None:
        parameter = first(model).get_parameter(name)
        parameter.data = parameter.data.to(dtype)

    return act


CASES: list[tuple[dict[str, Any], dict[str, Any], Callable[[PeftModel], None] | None, str]] = [
    ({}, {"init_lora_weights": "mica"}, None, "MiCAEmbeddingVariant is left to PEFT"),
    ({"max_norm": 0.5}, {}, None, "max_norm=0.5: looking rows up rewrites the weight"),
    ({"sparse": True}, {}, None, "sparse=True: PEFT's gradient"),
    ({}, {}, _base(Scaled), "the base layer is a Scaled, not Embedding"),
    ({}, {}, _attribute("embed_scale", 2.0), "the base layer has an embed_scale"),
    ({}, {}, _trainable, "base_layer.weight requires grad"),
    ({}, {}, _hook, "a forward hook sits on base_layer"),
    (
        {},
        {},
        _cast("lora_embedding_A.default", torch.float64),
        "lora_embedding_B is float32, lora_embedding_A",
    ),
]


@pytest.mark.parametrize(("base", "config", "act", "reason"), CASES, ids=[case[3][:30] for case in CASES])
def test_peft_itself_runs_and_the_report_says_why(
    base: dict[str, Any], config: dict[str, Any], act: Callable[[PeftModel], None] | None, reason: str
) -> None:
    peft = words(base, **config)
    if act is not None:
        act(peft)
    ours = patched_copy(peft)
    results = []
    for model in (ours, peft):
        try:
            results.append({name: value.to_dense() for name, value in step(model).items()})
        except RuntimeError as error:
            results.append({str(error): torch.zeros(1)})
    assert_equal(*results)
    found = row(ours)
    assert (found.fused, found.calls_fused, found.calls_fallback) == (False, 0, 1)
    assert re.search(reason, found.reason) and len(found.reason) <= 110, found.reason


def test_dora_caching_is_pefts() -> None:
    peft = words(use_dora=True).eval()
    ours = patched_copy(peft)
    with DoraCaching(), torch.no_grad():
        assert torch.equal(ours(tokens()), peft(tokens()))
        assert "DoraCaching is on" in row(ours).reason


def test_a_norm_that_dora_caching_left_behind_is_dropped_by_peft() -> None:
    peft = words(use_dora=True).eval()
    ours = patched_copy(peft)
    with torch.no_grad():
        for model in (peft, ours):
            with DoraCaching():
                model(tokens())
            model(tokens())
            with_noise(model)
        assert row(ours).reason == "DoraCaching kept a norm: PEFT's forward drops it"
        with DoraCaching():
            assert torch.equal(ours(tokens()), peft(tokens()))


def test_mixed_batches_and_odd_inputs_are_pefts() -> None:
    peft = words().eval()
    peft.add_adapter("other", LoraConfig(r=4, target_modules=["up"]))
    with_noise(peft)
    ours = patched_copy(peft)
    names = ["default", "other"]
    assert torch.equal(ours(tokens(), adapter_names=names), peft(tokens(), adapter_names=names))
    assert "called with adapter_names" in row(ours).reason
    assert torch.equal(ours(tokens(), adapter_names=None), ours(tokens()))
    assert row(ours).calls_fused == 2
    with pytest.raises(RuntimeError):
        ours(tokens().float())
    assert row(ours).reason == "x is float32, not indices in int64 or int32"
    first(ours).lora_embedding_A["default"].data = torch.empty(0)
    assert row(ours).fused  # at rest a partitioned parameter decides nothing
    with pytest.raises((RuntimeError, IndexError)):
        ours(tokens())
    assert row(ours).reason == "lora_embedding_A is [0], not its full shape: partitioned and not gathered"


def test_two_embeddings_of_one_tensor_are_no_group() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Embedding(ENTRIES, WIDTH), nn.Embedding(ENTRIES, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.down(x)

    peft = lora(Pair().to(DEVICE))
    ours = patched_copy(peft)
    for _ in range(3):
        assert_close(step(ours), step(peft))
    assert [each.region for each in pyfastlora.report(ours)] == ["embedding", "embedding"]
