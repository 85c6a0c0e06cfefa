"""L1 to L15 one by one: what a single disturbance of a training step cannot show.

Other layer types, inputs that PEFT itself refuses, transforms and modes, engines that move parameters.
"""

from __future__ import annotations

import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, process_group
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from torch import Tensor, nn

import pyfastlora
from pyfastlora.patching import layers

from .models import (
    HIDDEN,
    WIDTH,
    Toy,
    assert_close,
    assert_equal,
    difference,
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


class _OtherTensor(Tensor):
    pass


def test_l1_a_subclass_and_an_instance_forward_are_untouched() -> None:
    class Special(type(first(lora()))):  # type: ignore[misc]
        pass

    model = lora()
    first(model).__class__ = Special
    down = model.base_model.model.down
    down.forward = functools.partial(type(down).forward, down)
    found = pyfastlora.patch(model)
    assert found["up"].reason == "Special is not exactly PEFT's Linear, Linear4bit, Linear8bitLt or Embedding"
    assert found["down"].reason == "forward was replaced on the layer by a partial: patch before that"
    assert (type(first(model)), type(down).__name__) == (Special, "Linear")


def test_l1_a_forward_that_somebody_put_on_pefts_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    monkeypatch.setattr(type(first(model)), "forward", lambda self, x: x)
    reason = pyfastlora.patch(model)["up"].reason
    assert reason == f"Linear.forward comes from {__name__}, not from PEFT"
    assert torch.equal(first(model)(inputs(2, WIDTH)), inputs(2, WIDTH))


def test_l2_mixed_batches_are_pefts() -> None:
    peft = lora().eval()
    peft.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"]))
    with_noise(peft)
    ours = patched_copy(peft)
    x, names = inputs(3, WIDTH), ["default", "__base__", "other"]
    assert torch.equal(ours(x, adapter_names=names), peft(x, adapter_names=names))
    assert "called with adapter_names" in row(ours).reason
    assert torch.equal(first(ours)(x, adapter_names=None), first(ours)(x))  # None counts as absent
    assert row(ours).calls_fused == 2


def test_l2_positional_arguments_are_pefts() -> None:
    ours = patched_copy(lora())
    with pytest.raises(TypeError, match="positional argument"):  # nn.Linear's own complaint
        first(ours)(inputs(3, WIDTH), 1)
    assert row(ours).reason == "called with 1 positional arguments after x"


def test_l5_dora_caching() -> None:
    peft = lora(use_dora=True).eval()
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    with DoraCaching(), torch.no_grad():
        assert torch.equal(ours(x), peft(x))
        assert "DoraCaching is on" in row(ours).reason
        ours.train()(x)  # PEFT does not cache while training
    assert row(ours).calls_fused == 1


def test_l5_a_norm_that_dora_caching_left_behind() -> None:
    """PEFT's next forward outside of the cache drops it; kept, it would be used within the next."""
    peft = lora(use_dora=True).eval()
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    with torch.no_grad():
        for model in (peft, ours):
            with DoraCaching():
                model(x)
            model(x)
            with_noise(model)
        assert row(ours).reason == "DoraCaching kept a norm: PEFT's forward drops it"
        with DoraCaching():
            assert torch.equal(ours(x), peft(x))
        ours(x), ours(x)
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (1, 4)


def test_l6_a_conv1d_whose_layer_takes_it_for_a_linear() -> None:
    peft = lora(toy_conv1d(), fan_in_fan_out=True)
    first(peft).fan_in_fan_out = False
    ours = patched_copy(peft)
    assert_equal(step(first(ours), inputs(4, WIDTH)), step(first(peft), inputs(4, WIDTH)))
    assert row(ours).reason == "fan_in_fan_out is False over a Conv1D"


def test_l6_a_4bit_linear_under_a_dense_lora_layer() -> None:
    base = toy_4bit()
    base.is_loaded_in_4bit = False  # PEFT then takes its dense layer for what is an nn.Linear subclass
    peft = lora(base)
    ours = patched_copy(peft)
    assert_equal(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))
    assert "the base layer is a Linear4bit, not Linear" in row(ours).reason


def test_l6_bitnets_layers_run_their_own_forward() -> None:
    """A subclass of nn.Linear that makes its weight ternary and x of 8 bits, on the way."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    base = Toy()
    base.up = bitnet.AutoBitLinear(WIDTH, HIDDEN, online_quant=True)
    peft = lora(base)
    ours = patched_copy(peft)
    with torch.compiler.set_stance("force_eager"):  # it compiles itself
        found = step(ours, inputs(4, WIDTH))
        assert_close(found, step(peft, inputs(4, WIDTH)))
    plain = F.linear(inputs(4, WIDTH), base.up.weight, base.up.bias)
    assert difference(base.up(inputs(4, WIDTH)), plain) > 0.1
    assert row(ours).reason == "the base layer is a AutoBitLinear, not Linear"
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (0, 1)


def test_l7_dropout_in_place() -> None:
    peft = lora()
    first(peft).lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    ours = patched_copy(peft)
    results = []
    for model in (peft, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(first(model)(inputs(4, WIDTH)))
    assert torch.equal(*results)
    assert row(ours).reason == "dropout is in place: it overwrites x"


def assert_ends_alike(ours: nn.Module, peft: nn.Module, x: Tensor) -> None:
    """Both give the same, bit for bit, or raise the same."""
    ends: list[Any] = []
    for model in (peft, ours):
        try:
            ends.append(model(x).detach())
        except Exception as error:
            ends.append((type(error), str(error)))
    assert torch.equal(*ends) if isinstance(ends[0], Tensor) else ends[0] == ends[1]


def test_l8_a_mix_that_peft_refuses_is_refused_by_peft() -> None:
    peft = lora(lora().unload().to(torch.bfloat16))
    ours = patched_copy(peft)
    assert_ends_alike(first(ours), first(peft), inputs(4, WIDTH))
    assert row(ours).reason == "x is float32, the base weight bfloat16, and autocast is off"
    x = inputs(4, WIDTH, dtype=torch.bfloat16)
    assert_close(step(ours, x), step(peft, x), dtype=torch.bfloat16)
    assert row(ours).calls_fused == 1


def test_l8_integers_and_mixed_adapters() -> None:
    ours = patched_copy(lora())
    with pytest.raises(RuntimeError):
        ours(torch.ones(2, WIDTH, dtype=torch.int64))
    assert row(ours).reason == "x is int64, not a floating dtype from 16 to 64 bits"
    first(ours).lora_B.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        ours(inputs(2, WIDTH))
    assert row(ours).reason == "lora_B.weight is bfloat16, lora_A.weight float32"


def test_l8_base_bias_of_another_dtype() -> None:
    ours = patched_copy(lora())
    first(ours).base_layer.bias.data = first(ours).base_layer.bias.data.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        ours(inputs(2, WIDTH))
    assert row(ours).reason == "the base bias is bfloat16, the base weight float32, and autocast is off"


def test_l9_autocast_runs_fused() -> None:
    peft = lora(lora().unload().to(torch.bfloat16))
    ours = patched_copy(peft)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            ours_step, peft_step = (
                step(ours, inputs(4, WIDTH, dtype=dtype)),
                step(peft, inputs(4, WIDTH, dtype=dtype)),
            )
        assert_close(ours_step, peft_step, dtype=torch.bfloat16)
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (2, 0)


def test_l10_hooks_on_the_layer_itself_stay() -> None:
    """__call__ runs them, around forward; those inside are run by PEFT's forward, as often as before."""
    ours = patched_copy(lora())
    seen: list[str] = []
    first(ours).register_forward_hook(lambda *_: seen.append("layer"))
    ours(inputs(2, WIDTH))
    assert (seen, row(ours).calls_fused) == (["layer"], 1)
    handle = first(ours).base_layer.register_forward_hook(lambda *_: seen.append("base"))
    ours(inputs(2, WIDTH))
    assert (seen, row(ours).calls_fallback) == (["layer", "base", "layer"], 1)
    handle.remove()
    ours(inputs(2, WIDTH))
    assert (seen, row(ours).calls_fused) == (["layer", "base", "layer", "layer"], 2)


def test_l10_hooks_of_zero3_only_gather() -> None:
    """DeepSpeed ZeRO-3 has hooks on every module; a module's own next to them is still one too many."""
    peft = lora()
    ours = patched_copy(peft)

    def gather(*_: object) -> None: ...

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in ours.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(gather)
    assert_close({"y": ours(inputs(3, WIDTH))}, {"y": peft(inputs(3, WIDTH))})
    assert row(ours).calls_fused == 1
    first(ours).lora_A["default"].register_forward_hook(lambda *_: None)
    ours(inputs(3, WIDTH))
    assert row(ours).reason == "a forward hook sits on lora_A"


def test_l5_a_bias_that_is_a_plain_attribute() -> None:
    """As in a replica of DataParallel, and in FSDP1's hands."""
    ours = patched_copy(lora(use_dora=True))
    expand = first(ours).lora_B["default"]
    bias = torch.zeros(HIDDEN)
    del expand._parameters["bias"]
    expand.__dict__["bias"] = bias
    ours(inputs(3, WIDTH))
    assert row(ours).reason == "DoRA with lora_bias: PEFT adds the bias to every column of its norm"


def test_l11_tensor_subclasses_and_meta() -> None:
    peft = lora()
    ours = patched_copy(peft)
    x = inputs(2, WIDTH)
    with torch.no_grad():
        assert torch.equal(ours(x.as_subclass(_OtherTensor)), peft(x.as_subclass(_OtherTensor)))
    assert row(ours).reason == "x is a _OtherTensor, not a plain tensor"
    meta = pyfastlora.patch(lora().to("meta"))
    assert meta["up"].reason == "on the meta device: nothing to compute with"
    assert_ends_alike(first(ours), first(peft), x.to("meta"))
    assert row(ours).reason == "on the meta device: nothing to compute with"


def test_l11_another_layout() -> None:
    peft = lora()
    ours = patched_copy(peft)
    for model in (peft, ours):
        expand = first(model).lora_B["default"]
        expand.weight = nn.Parameter(expand.weight.data.to_sparse())
    assert_ends_alike(first(ours), first(peft), inputs(2, WIDTH))
    assert row(ours).reason == "lora_B.weight is sparse_coo, not strided"
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (0, 1)


def test_l11_another_device() -> None:
    ours, x = patched_copy(lora()), inputs(2, WIDTH)
    expand = first(ours).lora_B["default"]
    expand.weight = nn.Parameter(expand.weight.data.to("meta"))
    first(ours)(x)  # PEFT's: what torch multiplies with a tensor without values has no meaning
    assert row(ours).reason == f"lora_B.weight is on meta, x on {x.device}"
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (0, 1)


def test_l11_dtensor() -> None:
    """A fully_shard per linear leaves DTensors where the hooks of the linears would have gathered them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    with process_group() as mesh:
        peft = lora()
        ours = patched_copy(peft)
        for model in (peft, ours):
            module = first(model).lora_A["default"]
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(0)]))
        assert row(ours).fused  # at rest that decides nothing: a wrapped layer gathers before its forward
        assert_ends_alike(first(ours), first(peft), inputs(2, WIDTH))
        assert row(ours).reason == "lora_A.weight is a DTensor, not a plain tensor"
        assert not row(ours).fused


def test_l12_a_quant_state_that_does_not_fit() -> None:
    peft = lora(toy_4bit())
    ours = patched_copy(peft)
    for model in (peft, ours):
        first(model).base_layer.weight.quant_state.shape = torch.Size((WIDTH, HIDDEN))
    assert_ends_alike(first(ours), first(peft), inputs(3, WIDTH))
    assert row(ours).reason == "quant_state is for [64, 128], the layer is [128, 64]"


def test_l12_a_4bit_weight_that_pickle_made_a_plain_parameter() -> None:
    peft = pickle.loads(pickle.dumps(lora(toy_4bit())))
    assert type(first(peft).base_layer.weight) is nn.Parameter
    ours = patched_copy(peft)
    assert_close(step(ours, inputs(3, WIDTH)), step(peft, inputs(3, WIDTH)))
    assert row(ours).calls_fused == 1
    peft, dora = (pickle.loads(pickle.dumps(lora(toy_4bit(), use_dora=True))) for _ in range(2))
    pyfastlora.patch(dora)
    assert_ends_alike(first(dora), first(peft), inputs(3, WIDTH))
    assert row(dora).reason == "DoRA over a Parameter: PEFT decodes only a Params4bit"


def test_l12_a_weight_that_is_not_quantised_yet() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make() -> nn.Module:  # a copy of such a weight would never be quantised, nor one that was called
        base = toy_4bit()
        base.up = bnb.nn.Linear4bit(WIDTH, HIDDEN, compute_dtype=torch.float32)
        return get_peft_model(base, LoraConfig(target_modules=["up", "down"]))

    peft, ours, model = make(), make(), make()
    for each in (ours, model):
        assert "not quantised yet: move the model" in pyfastlora.patch(each)["up"].reason
    assert_ends_alike(first(ours), first(peft), inputs(2, WIDTH))
    model.to(DEVICE)
    assert pyfastlora.report(model)["up"].fused
    model(inputs(2, WIDTH))
    assert row(model).calls_fused == 1


def test_l14_torch_func() -> None:
    peft = lora()
    ours = patched_copy(peft)
    x = inputs(3, WIDTH)
    results = []
    for model in (peft, ours):
        parameters = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], row_of_x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, values, (row_of_x,)).square().sum()

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
    assert_equal(results[1], results[0])
    assert row(ours).reason == "inside a torch.func transform (grad, vmap, ...)"
    plain = torch.func.functional_call(ours, dict(peft.named_parameters()), (x,))
    assert_close({"y": plain}, {"y": peft(x)})
    assert row(ours).calls_fused == 1


def test_l14_forward_mode_ad() -> None:
    peft = lora()
    ours = patched_copy(peft)
    x, tangent = inputs(3, WIDTH), inputs(3, WIDTH, seed=8)
    results = []
    for model in (peft, ours):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            results.append(torch.autograd.forward_ad.unpack_dual(y))
    assert torch.equal(results[0].primal, results[1].primal)
    assert torch.equal(results[0].tangent, results[1].tangent)
    assert row(ours).reason == "inside forward-mode AD"


def test_l14_jit_trace() -> None:
    peft = lora()
    ours = patched_copy(peft)
    x = inputs(3, WIDTH)
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert row(ours).reason == "torch.jit.trace is recording"
    assert torch.equal(traced(2 * x), peft(2 * x))


@pytest.mark.parametrize("strict", [False, True])
def test_l14_export(strict: bool) -> None:
    ours = patched_copy(lora())
    x = inputs(3, WIDTH)
    program = torch.export.export(ours.base_model.model, (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "pyfastlora" in str(node.target)]
    assert torch.allclose(program.module()(x), ours(x), atol=1e-5)


def test_l14_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    ours = patched_copy(lora())
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ours(torch.empty(3, WIDTH))
    assert (tuple(y.shape), row(ours).calls_fused) == ((3, WIDTH), 0)
    assert row(ours).reason.startswith("FakeTensorMode is active")


def test_l14_a_default_device_is_no_obstacle() -> None:
    ours = patched_copy(lora())
    with DEVICE:
        ours(inputs(3, WIDTH))
    assert (row(ours).calls_fused, row(ours).reason) == (1, "")


@pytest.mark.own_device  # Dynamo does not get through a Params4bit under a default device (torch 2.13)
@pytest.mark.parametrize("build", [Toy, toy_4bit], ids=["dense", "4-bit"])
def test_l14_the_conditions_compile_without_a_graph_break(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both outcomes: a fused layer (by a formula, in place of the region) and one that runs PEFT."""

    def adapter_alone(x: Tensor, projections: list[Any]) -> list[Tensor]:
        (p,) = projections
        return [p.scaling * (x @ p.lora_A.T) @ p.lora_B.T]

    monkeypatch.setattr(layers, "fused_projections", adapter_alone)
    with DEVICE:
        ours = patched_copy(lora(build()))
    x = inputs(3, WIDTH)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_close({"y": compiled(x)}, {"y": ours(x)})
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (1, 0)  # counted in eager mode only
    if build is Toy:  # bitsandbytes' own forward does not compile in one graph
        ours.base_model.disable_adapter_layers()
        assert torch.equal(compiled(x), ours(x))
        assert (row(ours).calls_fused, row(ours).calls_fallback) == (1, 1)


def test_l15_wrong_widths_are_refused_by_peft() -> None:
    peft = lora()
    ours = patched_copy(peft)
    assert_ends_alike(first(ours), first(peft), inputs(3, WIDTH + 1))
    assert row(ours).reason == f"x is [3, {WIDTH + 1}]; its last dimension has to be {WIDTH}"


def test_l15_a_parameter_that_was_not_gathered() -> None:
    peft = lora()
    ours = patched_copy(peft)
    for model in (peft, ours):
        first(model).lora_A["default"].weight.data = torch.empty(0)
    assert row(ours).fused  # outside of a forward every parameter is partitioned: that decides nothing
    assert_ends_alike(first(ours), first(peft), inputs(3, WIDTH))
    assert row(ours).reason == "lora_A.weight is [0], not its full shape: partitioned and not gathered"


@pytest.mark.cpu_only("on a GPU bitsandbytes reads past the weight's end")
def test_l12_a_4bit_weight_that_was_not_gathered() -> None:
    ours = patched_copy(lora(toy_4bit()))
    first(ours).base_layer.weight.data = torch.empty(0, dtype=torch.uint8)
    assert row(ours).fused  # as above
    with pytest.raises(RuntimeError):
        ours(inputs(3, WIDTH))
    assert row(ours).reason == "base_layer.weight is [0], not its full shape: partitioned and not gathered"


class _Gathering(OrderedDict):  # type: ignore[type-arg]
    """What DeepSpeed ZeRO-3 makes of `_parameters`: indexing gathers, .get does not."""

    full: Tensor

    def __getitem__(self, key: str) -> Any:
        parameter = super().__getitem__(key)
        if parameter is not None and parameter.numel() == 0:
            parameter.data = self.full
        return parameter


def test_l15_parameters_are_read_so_that_zero3_gathers_them() -> None:
    peft = lora()
    ours = patched_copy(peft)
    module = first(ours).lora_A["default"]
    gathering = _Gathering(module._parameters)
    gathering.full = module.weight.data
    module.weight.data = torch.empty(0)
    module._parameters = gathering
    assert_close({"y": ours(inputs(3, WIDTH))}, {"y": peft(inputs(3, WIDTH))})
    assert row(ours).calls_fused == 1
