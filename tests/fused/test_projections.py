"""The fused projections against float64, PEFT and autograd's finite differences.

What could break: a gradient's scale or its cast, a mask that is not PEFT's, roundings more than PEFT has,
tensors kept that nobody needs, inputs that need no gradient.
"""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import DEVICE, assert_as_exact_on_average, error, name_of, noise
from peft_layers import FEATURES, SOME_FEATURES, Features, in_float64, peft_layer, projection_of, trainables

from pyfastlora.fused import projections as region
from pyfastlora.fused.projection import Projection, base_dtype, dropped_dtype
from pyfastlora.fused.projections import fused_projections
from pyfastlora.weights.dense import DenseWeight

SEEDS = range(3)


def run(function, layers, x, grads, autocast=None):
    """{"y0", .., "x", every trainable name: value or gradient} of one forward and backward under a fixed
    seed.
    """
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(77)
    with torch.autocast(DEVICE.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = function(x)
    named = [(f"{i}.{name}", p) for i, layer in enumerate(layers) for name, p in trainables(layer)]
    names, parameters = zip(*named, strict=True)
    grads = [dy.to(y.dtype) for dy, y in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, (x, *parameters), grads)
    values = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return {**values, "x": found[0], **dict(zip(names, found[1:], strict=True))}


def compare(siblings, dtype, adapter_dtype, kind, autocast=None, x_dtype=None, tokens=(2, 40)):
    """Our and PEFT's errors against PEFT in float64, over seeds, for every output and gradient.

    siblings: the features of the layers that share x.
    """
    errors = {}
    for seed in SEEDS:
        layers = [
            peft_layer(features, dtype, adapter_dtype, kind=kind, seed=seed + 10 * i)
            for i, features in enumerate(siblings)
        ]
        x = noise(*tokens, 128, dtype=x_dtype or dtype, seed=seed)
        dys = [noise(*tokens, 192, dtype=autocast or dtype, seed=seed + 100 + i) for i in range(len(layers))]
        exact = [in_float64(layer) for layer in layers]
        truth = run(
            lambda x, exact=exact: [f(x) for f in exact], exact, x.double(), map(torch.Tensor.double, dys)
        )
        theirs = run(lambda x, layers=layers: [f(x) for f in layers], layers, x, dys, autocast)
        ours = run(
            lambda x, layers=layers: fused_projections(x, list(map(projection_of, layers))),
            *(layers, x, dys, autocast),
        )
        assert theirs.keys() == ours.keys() == truth.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name
            pair = error(value, truth[name]), error(theirs[name], truth[name])
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        assert_as_exact_on_average(pairs, name)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft(features, dtype, adapter_dtype, kind):
    compare([features], dtype, adapter_dtype, kind)


@pytest.mark.parametrize("kind", ["conv1d", "int8"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=name_of,
)
@pytest.mark.parametrize("features", SOME_FEATURES, ids=str)
def test_as_exact_as_peft_in_other_formats(features, dtype, adapter_dtype, kind):
    compare([features], dtype, adapter_dtype, kind)


@pytest.mark.parametrize("kind", ["conv1d", "int8"])
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("features", SOME_FEATURES, ids=str)
def test_as_exact_as_peft_in_other_formats_under_autocast(features, x, kind):
    base = torch.float32 if kind == "conv1d" else torch.bfloat16
    compare([features], base, torch.float32, kind, autocast=torch.bfloat16, x_dtype=x)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft_as_on_the_other_devices(features, dtype, kind, monkeypatch):
    """Rounding S and expanding first where this device does not, and the other way round."""
    here = {DEVICE.type}
    monkeypatch.setattr(region, "ROUND_AS_PEFT", set() if region.ROUND_AS_PEFT & here else here)
    compare([features], dtype, dtype, kind)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft_under_autocast_as_on_the_other_devices(features, x, kind, monkeypatch):
    here = {DEVICE.type}
    monkeypatch.setattr(region, "ROUND_AS_PEFT", set() if region.ROUND_AS_PEFT & here else here)
    compare([features], torch.bfloat16, torch.float32, kind, autocast=torch.bfloat16, x_dtype=x)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("base", "x"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
    ids=name_of,
)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft_under_autocast(features, base, x, kind):
    compare([features], base, torch.float32, kind, autocast=torch.bfloat16, x_dtype=x)


@pytest.mark.parametrize("features", [Features(), Features(dora=True)], ids=str)
@pytest.mark.parametrize(
    ("kind", "device", "cast", "casts"),
    [
        ("dense", "cuda", torch.bfloat16, True),
        ("nf4", "cuda", torch.bfloat16, False),
        ("int8", "cuda", torch.bfloat16, False),
        ("nf4", "cuda", None, True),
        ("nf4", "cpu", torch.bfloat16, True),
    ],
)
def test_where_pefts_layer_casts(features, kind, device, cast, casts):
    """peft/tuners/lora/bnb.py: requires_conversion. It decides on the mask's dtype and on the output's."""
    p = projection_of(peft_layer(features, torch.bfloat16, torch.float32, kind=kind))
    assert dropped_dtype(torch.bfloat16, device, p, cast) == (torch.float32 if casts else torch.bfloat16)
    x = noise(1, 128, dtype=torch.bfloat16)
    if device == x.device.type:
        assert base_dtype(x, p, torch.bfloat16, cast) == torch.bfloat16


SIBLINGS = [Features(rank=3), Features(dropout=0.2), Features(dora=True, base_bias=True)]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("order", [0, 1], ids=["q,k,v", "v,k,q"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, None),
    ],
    ids=name_of,
)
def test_siblings_are_as_exact_as_peft(dtype, adapter_dtype, autocast, order, kind):
    """One pass of shrinks, masks in order, and one dx that sums what autograd would."""
    compare(SIBLINGS[:: 1 - 2 * order], dtype, adapter_dtype, kind, autocast)


UNEQUAL = [
    Features(rank=3),
    Features(rank=5, scaling=0.7, dora=True),
    Features(scaling=0.5),
    Features(rslora=True),
]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "rounded", "passes"),
    [
        (torch.float32, torch.float32, False, 1),
        (torch.bfloat16, torch.bfloat16, False, 1),
        (torch.float16, torch.float32, False, 1),
        (torch.bfloat16, torch.bfloat16, True, 2),  # 0.7 is no power of two away from 2
    ],
    ids=name_of,
)
def test_siblings_of_any_ranks_and_scalings_share_a_pass(dtype, adapter_dtype, rounded, passes, monkeypatch):
    monkeypatch.setattr(region, "ROUND_AS_PEFT", {DEVICE.type} if rounded else set())
    compare(UNEQUAL, dtype, adapter_dtype, "dense")
    layers = [peft_layer(features, dtype, adapter_dtype) for features in UNEQUAL]
    counted = []
    for name in ("lora_shrink", "lora_shrink_many"):
        own = getattr(region, name)
        monkeypatch.setattr(region, name, lambda *a, own=own, **k: (counted.append(own), own(*a, **k))[1])
    fused_projections(noise(2, 40, 128, dtype=dtype), [projection_of(layer) for layer in layers])
    assert len(counted) == passes


COMBINATIONS = [
    Projection(None, bias, "A", "B", lora_bias, 0.7, dropout, magnitude)
    for bias, lora_bias, dropout, magnitude in itertools.product(
        (None, "b"), (None, "bB"), (0.0, 0.4), (None, "m")
    )
    if not (lora_bias and magnitude)
]


def tensors_of(spec, inner=5, outer=4, ranks=3, seed=0):
    """A float64 projection of `spec`, every tensor a leaf that asks for its gradient."""
    seeds = itertools.count(10 * seed)

    def leaf(*shape):
        return noise(*shape, dtype=torch.float64, seed=next(seeds)).requires_grad_()

    return Projection(
        DenseWeight(leaf(outer, inner).detach()),
        leaf(outer) if spec.bias else None,
        leaf(ranks, inner) if spec.lora_A else None,
        leaf(outer, ranks) if spec.lora_B else None,
        leaf(outer) if spec.lora_bias else None,
        spec.scaling,
        spec.dropout,
        leaf(outer) if spec.magnitude else None,
    )


def reference_formula(x, p):
    """PEFT's forward in differentiable torch, the norm held constant."""
    w = p.weight.weight
    dropped = torch.nn.functional.dropout(x, p.dropout) if p.dropout else x
    base = x @ w.t() + (0 if p.bias is None else p.bias)
    if p.lora_A is None:
        return base
    low = (dropped @ p.lora_A.t()) @ p.lora_B.t() + (0 if p.lora_bias is None else p.lora_bias)
    if p.magnitude is None:
        return base + p.scaling * low
    norm = torch.linalg.norm(w + p.scaling * p.lora_B.detach() @ p.lora_A.detach(), dim=1)
    gain = p.magnitude / norm
    return base + (gain - 1) * (dropped @ w.t()) + gain * p.scaling * low


def leaves(x, projections):
    every = [
        t
        for p in projections
        for t in (p.bias, p.lora_A, p.lora_B, p.lora_bias, p.magnitude)
        if t is not None
    ]
    return [x, *every]


@pytest.mark.parametrize(
    "spec",
    COMBINATIONS,
    ids=lambda s: (
        f"{'bias' if s.bias else ''}{'bB' if s.lora_bias else ''}{s.dropout}{'m' if s.magnitude else ''}"
    ),
)
def test_every_gradient_is_the_formulas(spec):
    x = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    p = tensors_of(spec)
    inputs = leaves(x, [p])

    def ours(*_):
        torch.manual_seed(3)
        return fused_projections(x, [p])[0]

    torch.manual_seed(3)
    theirs = reference_formula(x, p)
    torch.testing.assert_close(ours(), theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(theirs)
    for got, want in zip(
        torch.autograd.grad(ours(), inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spec", [c for c in COMBINATIONS if not c.magnitude], ids=str)
def test_gradcheck(spec):
    """Finite differences; without DoRA, whose norm is deliberately not differentiated."""
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    p = tensors_of(spec)

    def function(x, *parts):
        torch.manual_seed(3)
        values = iter(parts)
        filled = [None if t is None else next(values) for t in (p.bias, p.lora_A, p.lora_B, p.lora_bias)]
        return fused_projections(x, [Projection(p.weight, *filled, p.scaling, p.dropout)])[0]

    assert torch.autograd.gradcheck(function, leaves(x, [p]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_dora_in_what_it_differentiates(dropout):
    """x, bias and magnitude: the norm does not depend on them."""
    spec = Projection(None, "b", "A", "B", None, 0.7, dropout, "m")
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    p = tensors_of(spec)
    a, b = p.lora_A.detach(), p.lora_B.detach()

    def function(x, bias, magnitude):
        torch.manual_seed(3)
        return fused_projections(x, [Projection(p.weight, bias, a, b, None, 0.7, dropout, magnitude)])[0]

    assert torch.autograd.gradcheck(function, (x, p.bias, p.magnitude))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_dora_siblings_at_a_norm_that_stands_still(dropout, monkeypatch):
    """Every parameter of two, A and B too: finite differences must not see the norm move."""
    spec = Projection(None, "b", "A", "B", None, 0.7, dropout, "m")
    x = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    specs = [(spec, 3), (replace(spec, scaling=1.3), 2)]
    siblings = [tensors_of(each, ranks=ranks, seed=i) for i, (each, ranks) in enumerate(specs)]
    norms = [p.weight.norm(p.lora_A.detach(), p.lora_B.detach(), p.scaling) for p in siblings]
    by_weight = {p.weight.weight.data_ptr(): norm for p, norm in zip(siblings, norms, strict=True)}
    monkeypatch.setattr(DenseWeight, "norm", lambda weight, *_: by_weight[weight.weight.data_ptr()])

    def function(x, *parts):
        torch.manual_seed(3)
        values = iter(parts)
        moved = []
        for p in siblings:
            bias, a, b, magnitude = (next(values) for _ in range(4))
            moved.append(Projection(p.weight, bias, a, b, None, p.scaling, dropout, magnitude))
        return tuple(fused_projections(x, moved))

    assert torch.autograd.gradcheck(function, leaves(x, siblings))


@pytest.mark.parametrize("spec", COMBINATIONS[:: len(COMBINATIONS) - 1], ids=["lora", "all"])
def test_a_weight_stored_transposed_gives_the_same(spec, monkeypatch):
    """In panels of 64 columns, so that DoRA's norm is put together from several."""
    monkeypatch.setattr(sys.modules["pyfastlora.ops._panels"], "PANEL_BYTES", 1)
    spec = replace(spec, magnitude=None if spec.lora_bias else "m")
    x = torch.randn(3, 150, dtype=torch.float64).requires_grad_()
    p = tensors_of(spec, inner=150)
    other = replace(p, weight=DenseWeight(p.weight.weight.t().contiguous(), transposed=True))
    results = []
    for each in (p, other):
        torch.manual_seed(3)
        y = fused_projections(x, [each])[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves(x, [each]))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_several_projections_share_one_input():
    """Unequal ranks and widths, one without an adapter, LoRA beside DoRA, dropout on one of them."""
    x = torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    whole = dict(bias="b", lora_A="A", lora_B="B")
    specs = [
        (Projection(None, **whole, scaling=0.5), 4, 3),
        (Projection(None, scaling=1.0), 6, 1),
        (Projection(None, **whole, scaling=2.0, magnitude="m"), 3, 2),
        (Projection(None, **whole, scaling=1.5, dropout=0.3), 7, 1),
    ]
    projections = [
        tensors_of(spec, outer=outer, ranks=ranks, seed=i) for i, (spec, outer, ranks) in enumerate(specs)
    ]
    inputs = leaves(x, projections)
    torch.manual_seed(5)
    ours = fused_projections(x, projections)
    torch.manual_seed(5)
    theirs = [reference_formula(x, p) for p in projections]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dys = [torch.randn_like(y) for y in theirs]
    for got, want in zip(
        torch.autograd.grad(ours, inputs, dys), torch.autograd.grad(theirs, inputs, dys), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    partial = torch.autograd.grad(fused_projections(x, projections)[2].sum(), inputs, allow_unused=True)
    assert partial[0] is not None and [g is None for g in partial[1:4]] == [True] * 3


@pytest.mark.parametrize(
    "spec",
    [COMBINATIONS[0], COMBINATIONS[-1], Projection(None, None, "A", "B", None, 1.0, 0.4, "m")],
    ids=["lora", "all", "dora"],
)
def test_only_the_gradients_asked_for(spec):
    p = tensors_of(spec)
    names = [n for n in ("bias", "lora_A", "lora_B", "lora_bias", "magnitude") if getattr(p, n) is not None]
    for wanted in itertools.chain.from_iterable(itertools.combinations(["x", *names], n) for n in (1, 2)):
        x = torch.randn(4, 5, dtype=torch.float64).requires_grad_("x" in wanted)
        for name in names:
            getattr(p, name).requires_grad_(name in wanted)
        inputs = [x if name == "x" else getattr(p, name) for name in wanted]
        torch.manual_seed(1)
        got = torch.autograd.grad(fused_projections(x, [p])[0].square().sum(), inputs)
        torch.manual_seed(1)
        want = torch.autograd.grad(reference_formula(x, p).square().sum(), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_magnitude_zero_has_finite_gradients():
    p = tensors_of(Projection(None, None, "A", "B", None, 1.0, 0.0, "m"))
    with torch.no_grad():
        p.magnitude[1] = 0
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    got = torch.autograd.grad(fused_projections(x, [p])[0].square().sum(), leaves(x, [p]))
    want = torch.autograd.grad(reference_formula(x, p).square().sum(), leaves(x, [p]))
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "budget"),
    [
        (Features(rank=16), 0.05),
        (Features(rank=16, dropout=0.1), 0.3),
        (Features(rank=16, dora=True), 1.1),
        (Features(rank=16, dora=True, dropout=0.1), 2.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4", "int8"])
def test_saved_bytes(features, budget, adapter_dtype, kind):
    """In units of x (bfloat16), beyond x itself and the parameters."""
    layer = peft_layer(features, torch.bfloat16, adapter_dtype, inner=1024, outer=1024, kind=kind)
    x = torch.randn(256, 1024).bfloat16().requires_grad_()
    projection = projection_of(layer)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *projection.weight.tensors)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_projections(x, [projection])[0]
    assert 0 < sum(saved.values()) / (x.numel() * 2) <= budget
    y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_x_is_kept_only_where_an_a_trains(dropout):
    """LoRA-FA freezes A: x may then be written to, as after PEFT's forward."""
    x = torch.randn(4, 5, dtype=torch.float64)
    p = tensors_of(Projection(None, "b", "A", "B", None, 1.5, dropout))
    p.lora_A.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    rows = leaf * 1
    torch.manual_seed(1)
    y = fused_projections(rows, [p])[0]
    rows.add_(1)
    found = torch.autograd.grad(y.square().sum(), [leaf, p.lora_B])
    torch.manual_seed(1)
    again = tensors_of(Projection(None, "b", "A", "B", None, 1.5, dropout))
    leaf = x.clone().requires_grad_()
    y = fused_projections(leaf, [again])[0]
    for got, want in zip(found, torch.autograd.grad(y.square().sum(), [leaf, again.lora_B]), strict=True):
        torch.testing.assert_close(got, want)


def test_backward_twice_over_a_retained_graph():
    p = tensors_of(Projection(None, "b", "A", "B", None, 1.0, 0.3, "m"))
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    y = fused_projections(x, [p])[0]
    first = torch.autograd.grad(y.sum(), leaves(x, [p]), retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves(x, [p]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad = torch.autograd.grad(fused_projections(x, [p])[0].square().sum(), x, create_graph=True)[0]
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "features", [Features(rank=3, dropout=0.2), Features(rank=3, dora=True, base_bias=True)], ids=str
)
def test_shapes_and_layouts(features, dtype):
    layer = peft_layer(features, dtype, inner=33, outer=19)
    for x in (
        torch.randn(33),
        torch.randn(1, 33),
        torch.randn(0, 33),
        torch.randn(2, 3, 4, 33),
        torch.randn(33, 7).t(),
        torch.randn(5, 2, 33).transpose(0, 1),
        torch.randn(6, 40)[:, 4:37],
        torch.randn(1, 33).expand(5, 33),
    ):
        if x.dim() == 1 and features.dora:
            continue  # PEFT's DoRA makes [1, O] of a vector
        x = x.to(dtype)
        dy = torch.randn(*x.shape[:-1], 19).to(dtype)
        torch.manual_seed(4)
        want = layer(x)
        torch.manual_seed(4)
        leaf = x.detach().requires_grad_()
        got = fused_projections(leaf, [projection_of(layer)])[0]
        assert got.shape == want.shape and got.dtype == want.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        torch.autograd.grad(got, leaf, dy.t().contiguous().t() if dy.dim() == 2 else dy)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)], ids=str)
def test_outputs_can_be_written_to_in_place(shape):
    """Llama 4 adds its routed experts to what its shared expert returned."""
    specs = [Projection(None, "b", "A", "B", None, 1.0), Projection(None, "b", "A", "B", None, 1.0, 0.0, "m")]
    x = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    projections = [tensors_of(spec, seed=i) for i, spec in enumerate(specs)]
    found = []
    for outputs in (fused_projections(x, projections), [reference_formula(x, p) for p in projections]):
        for y in outputs:
            y.mul_(3).add_(x.sum(-1, keepdim=True))
        found.append(torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves(x, projections)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_errors_say_what_did_not_fit():
    w = DenseWeight(torch.zeros(4, 5))
    a, b = torch.zeros(2, 5), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"x must end in 5 columns for W \[4, 5\]; got \[3, 6\]"):
        fused_projections(torch.zeros(3, 6), [Projection(w)])
    with pytest.raises(ValueError, match="come together"):
        fused_projections(torch.zeros(3, 5), [Projection(w, lora_A=a)])
    with pytest.raises(ValueError, match=r"must fit W \[4, 5\]; got \[2, 5\] and \[3, 2\]"):
        fused_projections(torch.zeros(3, 5), [Projection(w, lora_A=a, lora_B=b[:3])])
    with pytest.raises(ValueError, match="magnitude and lora_bias need"):
        fused_projections(torch.zeros(3, 5), [Projection(w, magnitude=torch.ones(4))])
    with pytest.raises(ValueError, match="DoRA with a bias on lora_B"):
        fused_projections(
            torch.zeros(3, 5), [Projection(w, None, a, b, torch.zeros(4), magnitude=torch.ones(4))]
        )


@pytest.mark.parametrize("kind", ["dense", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize(
    "features", [Features(), Features(dropout=0.1), Features(dora=True, base_bias=True)], ids=str
)
def test_one_graph_under_torch_compile(features, kind):
    torch._dynamo.reset()
    layer = peft_layer(features, torch.bfloat16, kind=kind)
    projection = projection_of(layer)
    x, dy = torch.randn(6, 128).bfloat16(), torch.randn(6, 192).bfloat16()

    def function(x):
        return fused_projections(x, [projection])

    want = run(function, [layer], x, [dy])
    got = run(torch.compile(function, fullgraph=True, backend="aot_eager"), [layer], x, [dy])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_the_backward_obeys_the_forwards_backend():
    from pyfastlora.ops import backend, lora_grad

    seen = []
    op = sys.modules[lora_grad.__module__].OP
    p = tensors_of(Projection(None, None, "A", "B", None, 1.0))
    single = Projection(DenseWeight(p.weight.weight.float()), None, p.lora_A.float(), p.lora_B.float())
    with backend("reference"):
        y = fused_projections(torch.randn(3, 5), [single])[0]
    original = op.choose
    try:
        op._chosen.clear()
        op.choose = lambda problem: seen.append(original(problem).name) or original(problem)
        y.sum().backward()
    finally:
        del op.choose
        op._chosen.clear()
    assert seen == ["reference"]
