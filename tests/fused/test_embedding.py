"""The fused embedding against float64, PEFT and autograd's finite differences.

What could break: where a gradient is scattered to, padding and frequencies, the norm over the vocabulary,
roundings more than PEFT has, tensors kept that nobody needs.
"""

import sys
from copy import deepcopy

import pytest
import torch
from accuracy import DEVICE, assert_as_exact_on_average, error, name_of, noise
from peft import LoraConfig, get_peft_model
from torch import nn

from pyfastlora.fused.embedding import AdaptedEmbedding, fused_embedding

ENTRIES, WIDTH = 61, 48
BASES = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "frequencies": {"scale_grad_by_freq": True, "padding_idx": ENTRIES - 1},
}
ADAPTERS = {"lora": {}, "rslora": {"use_rslora": True, "r": 9}, "dora": {"use_dora": True}}


def peft_embedding(dtype, adapter_dtype, base, adapter, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(ENTRIES, WIDTH, dtype=dtype, **base))
    layer = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["0"], **adapter})
    ).base_model.model[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
            parameter.data += 0.3 * torch.randn_like(parameter) * (parameter.abs().mean() + 0.1)
    return layer


def embedding_of(layer):
    base = layer.base_layer
    return AdaptedEmbedding(
        base.weight,
        layer.lora_embedding_A["default"],
        layer.lora_embedding_B["default"],
        layer.scaling["default"],
        layer.lora_magnitude_vector["default"].weight if layer.use_dora["default"] else None,
        base.padding_idx,
        base.scale_grad_by_freq,
    )


def indices(*shape, seed=0):
    """Few of the entries, so that they come several times; the padding entries among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 12, shape, generator=generator, device="cpu")
    return torch.where(drawn == 11, ENTRIES - 1, drawn).to(DEVICE)


def run(function, layer, x, dy, autocast=None):
    with torch.autocast(DEVICE.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = function(x)
    names, parameters = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad], strict=True)
    grads = torch.autograd.grad(y, parameters, dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_as_exact_as_peft(adapter, base, dtype, adapter_dtype, autocast):
    errors = {}
    for seed in range(3):
        layer = peft_embedding(dtype, adapter_dtype, base, adapter, seed)
        x, dy = indices(3, 40, seed=seed), noise(3, 40, WIDTH, dtype=dtype, seed=seed)
        exact = deepcopy(layer).double()
        truth = run(exact, exact, x, dy.double())
        theirs = run(layer, layer, x, dy, autocast)
        ours = run(lambda x, layer=layer: fused_embedding(x, embedding_of(layer)), layer, x, dy, autocast)
        assert ours.keys() == theirs.keys() == truth.keys()
        for name, value in ours.items():
            assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
            pair = error(value, truth[name]), error(theirs[name], truth[name])
            errors.setdefault(name, []).append(pair)
        padding = base.get("padding_idx")
        gradient = next(value for name, value in ours.items() if "embedding_A" in name)
        assert padding is None or not gradient[:, padding].any()
    for name, pairs in errors.items():
        assert_as_exact_on_average(pairs, name)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_float64_is_pefts(adapter, base):
    layer = peft_embedding(torch.float64, torch.float64, base, adapter)
    x, dy = indices(2, 30), noise(2, 30, WIDTH, dtype=torch.float64)
    theirs = run(layer, layer, x, dy)
    ours = run(lambda x: fused_embedding(x, embedding_of(layer)), layer, x, dy)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12)


def small(magnitude=False):
    generator = torch.Generator(DEVICE).manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device=DEVICE).requires_grad_()

    weight = leaf(7, 4).detach()
    return AdaptedEmbedding(weight, leaf(2, 7), leaf(4, 2), 0.7, leaf(4) if magnitude else None)


def test_gradcheck():
    e, x = small(), torch.tensor([[0, 3, 3], [6, 1, 0]])
    assert torch.autograd.gradcheck(
        lambda a, b: fused_embedding(x, AdaptedEmbedding(e.weight, a, b, 0.7)), (e.lora_A, e.lora_B)
    )


def test_gradcheck_of_the_magnitude():
    """The norm does not depend on it."""
    e, x = small(magnitude=True), torch.tensor([0, 3, 3, 6])
    a, b = e.lora_A.detach(), e.lora_B.detach()
    assert torch.autograd.gradcheck(
        lambda m: fused_embedding(x, AdaptedEmbedding(e.weight, a, b, 0.7, m)), (e.magnitude,)
    )


def test_magnitude_zero_has_finite_gradients():
    e = small(magnitude=True)
    with torch.no_grad():
        e.magnitude[1] = 0
    leaves = [e.lora_A, e.lora_B, e.magnitude]
    grads = torch.autograd.grad(fused_embedding(torch.tensor([1, 2, 2]), e).square().sum(), leaves)
    norm = torch.linalg.norm(e.weight + 0.7 * (e.lora_B @ e.lora_A).detach().t(), dim=0)
    rows = (e.weight + 0.7 * (e.lora_B @ e.lora_A).t())[[1, 2, 2]]
    expected = torch.autograd.grad((rows * (e.magnitude / norm)).square().sum(), leaves)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_only_the_gradients_asked_for():
    for wanted in ("lora_A", "lora_B", "magnitude"):
        e = small(magnitude=True)
        whole = torch.autograd.grad(
            fused_embedding(torch.tensor([1, 2, 2]), e).square().sum(), getattr(e, wanted)
        )
        for name in ("lora_A", "lora_B", "magnitude"):
            getattr(e, name).requires_grad_(name == wanted)
        alone = torch.autograd.grad(
            fused_embedding(torch.tensor([1, 2, 2]), e).square().sum(), getattr(e, wanted)
        )
        torch.testing.assert_close(alone, whole)


@pytest.mark.parametrize("adapter", [ADAPTERS["lora"], ADAPTERS["dora"]], ids=["lora", "dora"])
def test_shapes_and_index_dtypes(adapter):
    layer = peft_embedding(torch.float32, torch.float32, {}, adapter)
    many = indices(6, 5)
    for x in (
        many[0, 0],
        many[0],
        many[:0],
        many[None],
        many.t(),
        many[:, ::2],
        many.int(),
        many[:1].expand(4, 5),
    ):
        want, got = layer(x), fused_embedding(x, embedding_of(layer))
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        dy = torch.randn_like(want)
        leaves = [p for p in layer.parameters() if p.requires_grad]
        theirs, ours = (
            torch.autograd.grad(y, leaves, dy.mT.contiguous().mT if dy.dim() > 1 else dy) for y in (want, got)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu_only("on a GPU such an index ends the process")
def test_an_index_outside_the_vocabulary_is_refused_as_by_torch():
    layer = peft_embedding(torch.float32, torch.float32, {}, {})
    with pytest.raises(IndexError, match="out of range"):
        fused_embedding(torch.tensor([ENTRIES]), embedding_of(layer))


def test_the_norm_in_several_panels(monkeypatch):
    layer = peft_embedding(torch.float32, torch.float32, {}, ADAPTERS["dora"])
    layer.base_layer.weight.data = torch.randn(200, WIDTH)
    layer.lora_embedding_A["default"].data = 0.1 * torch.randn(4, 200)
    whole = fused_embedding(indices(5), embedding_of(layer))
    monkeypatch.setattr(sys.modules["pyfastlora.ops._panels"], "PANEL_BYTES", 1)  # 64 entries a panel
    torch.testing.assert_close(fused_embedding(indices(5), embedding_of(layer)), whole)
    torch.testing.assert_close(whole, layer(indices(5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [ADAPTERS["lora"], ADAPTERS["dora"]], ids=["lora", "dora"])
def test_saved_are_the_indices_and_the_rows_of_the_rank(adapter):
    layer = peft_embedding(torch.bfloat16, torch.float32, {}, adapter)
    x = indices(4, 100)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_embedding(x, embedding_of(layer))
    norm = 4 * WIDTH if adapter else 0
    assert sum(saved.values()) == x.numel() * 4 * 4 + norm
    y.sum().backward()


def test_backward_twice_over_a_retained_graph():
    e = small(magnitude=True)
    leaves = [e.lora_A, e.lora_B, e.magnitude]
    y = fused_embedding(torch.tensor([1, 2, 2]), e)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"must fit W \[7, 4\]; got \[2, 6\] and \[4, 2\]"):
        e = AdaptedEmbedding(torch.zeros(7, 4), torch.zeros(2, 6), torch.zeros(4, 2))
        fused_embedding(torch.tensor([1]), e)


@pytest.mark.parametrize("adapter", [ADAPTERS["lora"], ADAPTERS["dora"]], ids=["lora", "dora"])
def test_one_graph_under_torch_compile(adapter):
    torch._dynamo.reset()
    layer = peft_embedding(torch.bfloat16, torch.float32, BASES["padding"], adapter)
    e, x, dy = embedding_of(layer), indices(20), torch.randn(20, WIDTH)
    compiled = torch.compile(lambda x: fused_embedding(x, e), fullgraph=True, backend="aot_eager")
    want, got = run(lambda x: fused_embedding(x, e), layer, x, dy), run(compiled, layer, x, dy)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
