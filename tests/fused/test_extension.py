"""The adapter inside a 4-bit weight's GEMM, and the copies with room, as on a GPU but on this device.

What could break: halves of S or of a factor that meet the wrong ones, columns of the room that hold
yesterday's values, a copy that is stale, kept for the wrong weight or never given back.
"""

import pytest
import torch
from accuracy import DEVICE, assert_as_exact_on_average, error, noise
from peft_layers import Features, in_float64, peft_layer, projection_of, trainables
from torch.utils.checkpoint import checkpoint

from pyfastlora.fused import extension
from pyfastlora.fused.projections import fused_projections
from pyfastlora.weights import ROOM, _dense_copy

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install pyfastlora[qlora]")


@pytest.fixture
def copies(monkeypatch):
    """Dense copies on this device, each product counted: {(for a gradient, found kept): count}."""
    counted = {}
    make = _dense_copy.dense_copy

    def counting(w, dtype, values, *, gradient):
        kept = (w.packed.data_ptr(), dtype, values) in _dense_copy.kept() and gradient
        counted[gradient, kept] = counted.get((gradient, kept), 0) + 1
        copy = make(w, dtype, values, gradient=gradient)
        if not kept:
            copy[w.shape[0] :], copy[:, w.shape[1] :] = (
                torch.nan,
                torch.nan,
            )  # unless written
        return copy

    monkeypatch.setattr(_dense_copy, "GPUS", {DEVICE.type})
    monkeypatch.setattr(_dense_copy, "dense_copy", counting)
    return counted


@pytest.fixture
def extended(monkeypatch):
    """The extension whatever it costs; the number of its products."""
    calls = []
    monkeypatch.setattr(extension, "LAUNCHES_IN_BYTES", -torch.inf)
    for name in ("linear", "input_grad"):
        product = getattr(extension, name)
        monkeypatch.setattr(
            extension, name, lambda *a, product=product, name=name: (calls.append(name), product(*a))[1]
        )
    return calls


def run(function, layer, x, dy):
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = function(x)
    names, parameters = zip(*trainables(layer), strict=True)
    return dict(
        zip(("y", "x", *names), (y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)), strict=True)
    )


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "features", [Features(rank=5), Features(rank=21), Features(rank=16, dropout=0.2)], ids=str
)
def test_as_exact_as_peft(copies, extended, features, adapter_dtype):
    errors = {}
    for seed in range(3):
        layer = peft_layer(features, torch.bfloat16, adapter_dtype, kind="nf4", seed=seed)
        x, dy = (
            noise(40, 128, dtype=torch.bfloat16, seed=seed),
            noise(40, 192, dtype=torch.bfloat16, seed=9 + seed),
        )
        exact = in_float64(layer)
        truth, theirs = run(exact, exact, x.double(), dy.double()), run(layer, layer, x, dy)
        ours = run(lambda x, layer=layer: fused_projections(x, [projection_of(layer)])[0], layer, x, dy)
        for name, value in ours.items():
            pair = error(value, truth[name]), error(theirs[name], truth[name])
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        assert_as_exact_on_average(pairs, name)
    # Dropout comes after the expansion of dx: there the GEMM cannot take it along.
    assert extended == (["linear"] if features.dropout else ["linear", "input_grad"]) * 3
    assert copies == {(False, False): 3, (True, False): 3}


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        (Features(rank=22), torch.bfloat16),  # three columns a rank do not fit
        (Features(base_bias=True), torch.bfloat16),
        (Features(dora=True), torch.bfloat16),
        (Features(), torch.float16),
    ],
    ids=str,
)
def test_left_out_where_it_does_not_fit(copies, extended, features, dtype):
    layer = peft_layer(features, dtype, torch.float32, kind="nf4")
    x, dy = noise(40, 128, dtype=dtype), noise(40, 192, dtype=dtype, seed=1)
    run(lambda x: fused_projections(x, [projection_of(layer)])[0], layer, x, dy)
    assert "linear" not in extended


def test_pays_by_bytes():
    """Gate and up of an 8B model forward, its down backward; not q, not the other way, not few tokens."""

    def pays(tokens, inputs, outputs):
        with torch.device("meta"):
            rows, s = torch.empty(tokens, inputs, dtype=torch.bfloat16), torch.empty(tokens, 16)
            return extension.pays(rows, outputs, s, torch.empty(outputs, 16))

    assert pays(8192, 4096, 14336)
    assert not pays(8192, 4096, 4096) and not pays(8192, 14336, 4096) and not pays(512, 4096, 14336)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_leaves_its_copy_to_the_gradient(copies, reentrant):
    layers = [peft_layer(Features(), torch.bfloat16, kind="nf4", outer=128, seed=seed) for seed in range(2)]
    x, dy = noise(40, 128, dtype=torch.bfloat16), noise(40, 128, dtype=torch.bfloat16, seed=1)

    def through(x):
        for layer in layers:
            x = fused_projections(x, [projection_of(layer)])[0]
        return x

    plain = run(through, torch.nn.ModuleList(layers), x, dy)
    copies.clear()
    leaf = x.clone().requires_grad_()
    y = checkpoint(through, leaf, use_reentrant=reentrant)
    assert copies == {(False, False): 2}
    y.backward(dy)
    assert copies == {(False, False): 4, (True, True): 2}
    assert torch.equal(leaf.grad, plain["x"])
    assert not _dense_copy.kept()


def test_what_no_gradient_took_is_dropped_with_the_pass(copies):
    layer = peft_layer(Features(), torch.bfloat16, kind="nf4")
    x = noise(40, 128, dtype=torch.bfloat16)  # no gradient: W's is the only one it would have fed
    y = checkpoint(lambda x: fused_projections(x, [projection_of(layer)])[0], x, use_reentrant=False)
    y.backward(torch.ones_like(y))
    assert copies == {(False, False): 2}
    assert not _dense_copy.kept()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_raised_leaves_nothing(copies, reentrant):
    layer = peft_layer(Features(), torch.bfloat16, kind="nf4")
    x, dy = noise(40, 128, dtype=torch.bfloat16), noise(40, 192, dtype=torch.bfloat16, seed=1)
    x.requires_grad_()
    broken = [True]

    def fail(gradient):
        if broken[0]:
            raise RuntimeError("on purpose")

    def forward(x):
        y = fused_projections(x, [projection_of(layer)])[0]
        if y.requires_grad:  # in the forward that runs again, before the gradient that would take its copy
            y.register_hook(fail)
        return y

    def gradient():
        (dx,) = torch.autograd.grad(fused_projections(x, [projection_of(layer)])[0], x, dy)
        return dx

    before = gradient()
    with pytest.raises(RuntimeError, match="on purpose"):
        checkpoint(forward, x, use_reentrant=reentrant).backward(dy)
    broken[0] = False
    layer.base_layer.weight.data.bitwise_not_()  # other codes at the same address
    after = gradient()
    assert not _dense_copy.kept()
    x.grad = None
    checkpoint(forward, x, use_reentrant=reentrant).backward(dy)
    assert torch.equal(x.grad, after) and not torch.equal(after, before)


def test_the_room_is_one_step_of_a_gemm():
    assert ROOM % 64 == 0


@pytest.mark.own_device  # Dynamo does not get through a Params4bit under a default device (torch 2.13)
@pytest.mark.parametrize("extends", [False, True])
def test_compiles_whole(monkeypatch, extends):
    monkeypatch.setattr(_dense_copy, "GPUS", {DEVICE.type})
    monkeypatch.setattr(extension, "LAUNCHES_IN_BYTES", -torch.inf if extends else torch.inf)
    with DEVICE:
        layer = peft_layer(Features(), torch.bfloat16, kind="nf4")
    x, dy = noise(40, 128, dtype=torch.bfloat16), noise(40, 192, dtype=torch.bfloat16, seed=1)

    def region(x):
        return fused_projections(x, [projection_of(layer)])[0]

    eager, compiled = run(region, layer, x, dy), torch.compile(region, backend="aot_eager", fullgraph=True)
    for name, value in run(compiled, layer, x, dy).items():
        torch.testing.assert_close(value, eager[name], msg=name)
