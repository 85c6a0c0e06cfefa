"""The fused feed-forward block against float64, PEFT and finite differences.

What could break: the derivative of an activation, gate taken for up, masks in another order than PEFT's, a
half of a packed gradient, a product or an output kept that nobody needs, gradients nobody asked for.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_exact_on_average, error, name_of, noise
from peft_layers import Features, in_float64, peft_layer, projection_of, trainables
from torch import nn

from pyfastlora.fused.mlp import fused_mlp
from pyfastlora.fused.projection import Projection
from pyfastlora.ops.glu import ACTS
from pyfastlora.weights.dense import DenseWeight

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
INNER, HIDDEN = 64, 128


class Block(nn.Module):
    """PEFT's layers around torch's activation; packed: one layer of both, in this order of gate and up."""

    def __init__(self, act, inputs, down, gate_first=True):
        super().__init__()
        self.act, self.gate_first = act, gate_first
        self.inputs, self.down = nn.ModuleList(inputs), down

    def forward(self, x):
        outputs = [layer(x) for layer in self.inputs]
        first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.down(ACTIVATIONS[self.act](gate) * up)

    def fused(self, x):
        inputs = [projection_of(layer) for layer in self.inputs]
        return fused_mlp(x, inputs, projection_of(self.down), self.act, gate_first=self.gate_first)

    def in_float64(self):
        inputs = [in_float64(layer) for layer in self.inputs]
        return Block(self.act, inputs, in_float64(self.down), self.gate_first)


def block(act, features, dtype, adapter_dtype, *, packed=False, gate_first=True, four_bit=(), seed=0):
    """A Block whose layers named in `four_bit` are so; "first", "second" (of two inputs) and "down"."""
    sizes = {"first": (INNER, HIDDEN), "second": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    if packed:
        sizes = {"first": (INNER, 2 * HIDDEN), "down": (HIDDEN, INNER)}
    *inputs, down = (
        peft_layer(
            features,
            dtype,
            adapter_dtype,
            kind="nf4" if name in four_bit else "dense",
            inner=inner,
            outer=outer,
            seed=7 * seed + i,
        )
        for i, (name, (inner, outer)) in enumerate(sizes.items())
    )
    return Block(act, inputs, down, gate_first)


def run(function, module, x, dy, autocast=None):
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(77)
    with torch.autocast(DEVICE.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = function(x)
    names, parameters = zip(*trainables(module), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy.to(y.dtype))
    return {"y": y.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def compare(make, dtype, autocast=None, x_dtype=None):
    """Our and PEFT's errors against float64 of the block that `make(seed)` gives, for every result."""
    errors = {}
    for seed in range(3):
        theirs = make(seed)
        exact = theirs.in_float64()
        x, dy = noise(2, 21, INNER, dtype=x_dtype or dtype, seed=seed), noise(2, 21, INNER, seed=seed + 100)
        truth = run(exact, exact, x.double(), dy.double())
        peft = run(theirs, theirs, x, dy.to(dtype), autocast)
        ours = run(theirs.fused, theirs, x, dy.to(dtype), autocast)
        assert ours.keys() == peft.keys() == truth.keys()
        for name, value in ours.items():
            assert value.dtype == peft[name].dtype and value.shape == peft[name].shape, name
            errors.setdefault(name, []).append((error(value, truth[name]), error(peft[name], truth[name])))
    for name, pairs in errors.items():
        assert_as_exact_on_average(pairs, name)


FEATURES = [
    Features(),
    Features(dropout=0.2),
    Features(base_bias=True, train_base_bias=True, lora_bias=True),
    Features(dora=True, base_bias=True),
    Features(dora=True, dropout=0.2),
]
FOUR_BIT = {"dense": (), "nf4": ("first", "second", "down")}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("four_bit", FOUR_BIT.values(), ids=FOUR_BIT)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=name_of)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft(features, dtype, adapter_dtype, four_bit):
    compare(lambda seed: block("silu", features, dtype, adapter_dtype, four_bit=four_bit, seed=seed), dtype)


@pytest.mark.parametrize("four_bit", FOUR_BIT.values(), ids=FOUR_BIT)
@pytest.mark.parametrize(
    ("dtype", "x"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
    ids=name_of,
)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_as_exact_as_peft_under_autocast(features, dtype, x, four_bit):
    def make(seed):
        return block("gelu_tanh", features, dtype, torch.float32, four_bit=four_bit, seed=seed)

    compare(make, dtype, autocast=torch.bfloat16, x_dtype=x)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("four_bit", [("first",), ("second", "down")], ids="+".join)
def test_four_bit_beside_dense(four_bit, autocast):
    """Under autocast a 4-bit layer gives x's dtype back and a dense one autocast's: act * up mixes them."""

    def make(seed):
        features = Features(dropout=0.1)
        return block("silu", features, torch.float32, torch.float32, four_bit=four_bit, seed=seed)

    compare(make, torch.float32, autocast)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "up first"])
def test_every_activation_and_order(act, packed, gate_first):
    def make(seed):
        features = Features(dropout=0.2, dora=packed)
        where = {"packed": packed, "gate_first": gate_first}
        return block(act, features, torch.bfloat16, torch.float32, seed=seed, **where)

    compare(make, torch.bfloat16)


@pytest.mark.parametrize("features", [Features(), Features(dora=True, base_bias=True)], ids=str)
@pytest.mark.parametrize("four_bit", FOUR_BIT.values(), ids=FOUR_BIT)
def test_packed_as_exact_as_peft(features, four_bit):
    def make(seed):
        return block(
            "silu", features, torch.bfloat16, torch.float32, packed=True, four_bit=four_bit, seed=seed
        )

    compare(make, torch.bfloat16)


# ---- float64 and the formula itself
# ------------------------------------------------------------------------------------

PLAIN = Projection(None, scaling=1.0)
LORA = Projection(None, "b", "A", "B", "bB", 0.7)
DROPOUT = Projection(None, None, "A", "B", None, 1.3, 0.3)
DORA = Projection(None, "b", "A", "B", None, 0.7, 0.0, "m")
DORA_DROPOUT = Projection(None, None, "A", "B", None, 0.7, 0.3, "m")
TENSORS = ("bias", "lora_A", "lora_B", "lora_bias", "magnitude")


def tensors_of(spec, inner, outer, seed):
    """A float64 projection of `spec`, every tensor a leaf that asks for its gradient."""
    seeds = itertools.count(10 * seed)
    shapes = {"bias": (outer,), "lora_A": (2, inner), "lora_B": (outer, 2), "lora_bias": (outer,)}
    shapes["magnitude"] = (outer,)
    made = {
        name: noise(*shape, dtype=torch.float64, seed=next(seeds)).requires_grad_()
        if getattr(spec, name)
        else None
        for name, shape in shapes.items()
    }
    weight = DenseWeight(noise(outer, inner, dtype=torch.float64, seed=next(seeds)))
    return Projection(weight, scaling=spec.scaling, dropout=spec.dropout, **made)


def specs(*chosen, packed=False):
    """(inputs, down) of width 3 -> 4 -> 5."""
    *inputs, down = chosen
    outer = 8 if packed else 4
    made = [tensors_of(spec, 3, outer, i) for i, spec in enumerate(inputs)]
    return made, tensors_of(down, 4, 5, 9)


def leaves(projections):
    return [getattr(p, name) for p in projections for name in TENSORS if getattr(p, name) is not None]


def filled(projections, values):
    """The projections around other tensors, in the order of `leaves`."""
    values = iter(values)
    made = []
    for p in projections:
        new = {name: next(values) if getattr(p, name) is not None else None for name in TENSORS}
        made.append(Projection(p.weight, scaling=p.scaling, dropout=p.dropout, **new))
    return made


def formula(x, p):
    """PEFT's forward in differentiable torch, the norm held constant."""
    w = p.weight.weight
    dropped = F.dropout(x, p.dropout) if p.dropout else x
    base = x @ w.t() + (0 if p.bias is None else p.bias)
    if p.lora_A is None:
        return base
    low = (dropped @ p.lora_A.t()) @ p.lora_B.t() + (0 if p.lora_bias is None else p.lora_bias)
    if p.magnitude is None:
        return base + p.scaling * low
    norm = torch.linalg.norm(w + p.scaling * p.lora_B.detach() @ p.lora_A.detach(), dim=1)
    gain = p.magnitude / norm
    return base + (gain - 1) * (dropped @ w.t()) + gain * p.scaling * low


def reference(x, inputs, down, act, gate_first=True):
    outputs = [formula(x, p) for p in inputs]
    first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return formula(ACTIVATIONS[act](gate) * up, down)


SETS = {
    "plain": (PLAIN, PLAIN, LORA),
    "lora": (LORA, LORA, LORA),
    "dropout": (DROPOUT, DROPOUT, DROPOUT),
    "dora": (DORA, LORA, DORA),
    "mixed": (DORA_DROPOUT, PLAIN, DROPOUT),
    "down plain": (LORA, DORA, PLAIN),
    "packed": (DROPOUT, LORA),
    "packed dora": (DORA, DORA_DROPOUT),
    "packed plain": (PLAIN, LORA),
}


def seeded(function, *args, **kwargs):
    torch.manual_seed(3)
    return function(*args, **kwargs)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "up first"])
def test_every_gradient_is_the_formulas(chosen, act, gate_first):
    inputs, down = specs(*chosen, packed=len(chosen) == 2)
    x = noise(2, 3, 3, dtype=torch.float64, seed=1).requires_grad_()
    wanted = [x, *leaves([*inputs, down])]
    ours = seeded(fused_mlp, x, inputs, down, act, gate_first=gate_first)
    theirs = seeded(reference, x, inputs, down, act, gate_first)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = noise(*theirs.shape, dtype=torch.float64, seed=2)
    for got, want in zip(
        torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["plain", "lora", "dropout", "packed"])
def test_gradcheck(act, name):
    """Finite differences; without DoRA, whose norm is deliberately not differentiated."""
    inputs, down = specs(*SETS[name], packed=name == "packed")
    x = noise(2, 3, dtype=torch.float64, seed=1).requires_grad_()

    def function(x, *values):
        *into, out = filled([*inputs, down], values)
        return seeded(fused_mlp, x, into, out, act)

    assert torch.autograd.gradcheck(function, (x, *leaves([*inputs, down])))


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_of_dora_in_what_it_differentiates(act):
    """x, bias and magnitude: the norm does not depend on them."""
    inputs, down = specs(DORA, DORA_DROPOUT, DORA)
    projections = [*inputs, down]
    x = noise(2, 3, dtype=torch.float64, seed=1).requires_grad_()
    for p in projections:
        p.lora_A.requires_grad_(False), p.lora_B.requires_grad_(False)

    def function(x, *magnitudes):
        values = iter(magnitudes)
        made = [
            Projection(p.weight, p.bias, p.lora_A, p.lora_B, None, p.scaling, p.dropout, next(values))
            for p in projections
        ]
        return seeded(fused_mlp, x, made[:2], made[2], act)

    assert torch.autograd.gradcheck(function, (x, *(p.magnitude for p in projections)))


def test_only_the_gradients_asked_for():
    inputs, down = specs(DORA, DROPOUT, LORA)
    everything = leaves([*inputs, down])
    for wanted in ([0], [1], [4], [5], [6], [9], [8, 9], [0, 9], [-1], [-1, 7], list(range(len(everything)))):
        x = noise(4, 3, dtype=torch.float64, seed=1).requires_grad_(-1 in wanted)
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i in wanted)
        asked = [x if i == -1 else everything[i] for i in wanted]
        y = seeded(fused_mlp, x, inputs, down, "gelu")
        got = torch.autograd.grad(y.square().sum(), asked)
        want = torch.autograd.grad(seeded(reference, x, inputs, down, "gelu").square().sum(), asked)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert not fused_mlp(noise(4, 3, dtype=torch.float64), inputs, down, "silu").requires_grad


def test_outputs_can_be_written_into():
    """As PEFT's can, by an in-place activation or residual; and what was saved is not among them."""
    for chosen in ((LORA, LORA, LORA), (PLAIN, PLAIN, DORA), (DROPOUT, DORA, DORA_DROPOUT)):
        inputs, down = specs(*chosen)
        for shape in ((3,), (2, 3), (2, 2, 3), (1, 2, 2, 3)):
            x = noise(*shape, dtype=torch.float64).requires_grad_()
            want = seeded(fused_mlp, x, inputs, down, "silu") * 2
            got = seeded(fused_mlp, x, inputs, down, "silu").mul_(2)
            grads = [
                torch.autograd.grad(y.square().sum(), [x, *leaves([*inputs, down])]) for y in (want, got)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_magnitude_zero_has_finite_gradients():
    inputs, down = specs(DORA, DORA, DORA)
    with torch.no_grad():
        inputs[0].magnitude[1] = inputs[1].magnitude[2] = down.magnitude[0] = 0
    x = noise(4, 3, dtype=torch.float64).requires_grad_()
    wanted = [x, *leaves([*inputs, down])]
    got = torch.autograd.grad(fused_mlp(x, inputs, down, "silu").square().sum(), wanted)
    want = torch.autograd.grad(reference(x, inputs, down, "silu").square().sum(), wanted)
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_backward_twice_over_a_retained_graph():
    inputs, down = specs(DORA, DROPOUT, LORA)
    x = noise(4, 3, dtype=torch.float64).requires_grad_()
    wanted = [x, *leaves([*inputs, down])]
    y = fused_mlp(x, inputs, down, "silu")
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        y = fused_mlp(x, inputs, down, "silu").square().sum()
        torch.autograd.grad(y, x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("chosen", [SETS["mixed"], SETS["packed dora"]], ids=["two", "packed"])
def test_shapes_and_layouts(chosen):
    inputs, down = specs(*chosen, packed=len(chosen) == 2)
    wanted = leaves([*inputs, down])
    for x in (
        noise(1, 3),
        noise(0, 3),
        noise(2, 0, 3),
        noise(2, 1, 4, 3),
        noise(3, 7).t(),
        noise(5, 2, 3).transpose(0, 1),
        noise(6, 9)[:, 4:7],
        noise(1, 3).expand(5, 3),
    ):
        leaf = x.double().requires_grad_()
        ours = seeded(fused_mlp, leaf, inputs, down, "silu")
        theirs = seeded(reference, leaf, inputs, down, "silu")
        assert ours.shape == theirs.shape
        dy = noise(*ours.shape[:-1], 10, dtype=torch.float64, seed=2)[..., ::2]
        for got, want in zip(
            (ours, *torch.autograd.grad(ours, [leaf, *wanted], dy)),
            (theirs, *torch.autograd.grad(theirs, [leaf, *wanted], dy)),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# Of the product's size [T, HIDDEN]: gate and up, then masks and ranks; DoRA keeps down's product, half of
# that, with dropout those of all three, in the adapter's float32.
BUDGETS = [
    (Features(rank=4), 2.2),
    (Features(rank=4, dropout=0.1), 2.4),
    (Features(rank=4, dora=True), 2.7),
    (Features(rank=4, dora=True, dropout=0.1), 7.4),
]


@pytest.mark.parametrize(("features", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("four_bit", FOUR_BIT.values(), ids=FOUR_BIT)
def test_saved_bytes(features, budget, packed, four_bit):
    """Beyond x and the parameters; x is saved once."""
    module = block("silu", features, torch.bfloat16, torch.float32, packed=packed, four_bit=four_bit)
    x = noise(512, INNER, dtype=torch.bfloat16).requires_grad_()
    weights = [projection_of(layer).weight.tensors for layer in (*module.inputs, module.down)]
    known = {t.untyped_storage().data_ptr() for t in itertools.chain(module.parameters(), *weights)}
    saved, times = {}, 0

    def pack(t):
        nonlocal times
        if t.data_ptr() == x.data_ptr():
            times += 1
        elif t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module.fused(x)
    assert times == 1 and 2 <= sum(saved.values()) / (512 * HIDDEN * 2) <= budget
    y.sum().backward()


def test_errors_say_what_did_not_fit():
    inputs, down = specs(LORA, LORA, LORA)
    x = noise(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"fused_mlp: x must end in 3 columns for W \[4, 3\]; got \[2, 4\]"):
        fused_mlp(noise(2, 4, dtype=torch.float64), inputs, down, "silu")
    with pytest.raises(ValueError, match=r"the product must end in 4 columns for W \[5, 4\]; got \[2, 2\]"):
        fused_mlp(x, inputs[:1], down, "silu")
    with pytest.raises(
        ValueError, match=r"gate and up of one width, or one projection of both; got \[4, 8\]"
    ):
        fused_mlp(x, [inputs[0], tensors_of(PLAIN, 3, 8, 0)], down, "silu")
    with pytest.raises(ValueError, match="act must be one of silu"):
        fused_mlp(x, inputs, down, "swish")


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("features", [Features(dropout=0.1), Features(dora=True, base_bias=True)], ids=str)
def test_one_graph_under_torch_compile(features, packed):
    torch._dynamo.reset()
    four_bit = () if packed else ("first",)
    module = block("silu", features, torch.bfloat16, torch.float32, packed=packed, four_bit=four_bit)
    x, dy = noise(6, INNER, dtype=torch.bfloat16), noise(6, INNER, dtype=torch.bfloat16, seed=1)
    want = run(module.fused, module, x, dy)
    got = run(torch.compile(module.fused, fullgraph=True, backend="aot_eager"), module, x, dy)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
