"""The chunked loss of a head against PEFT's head with torch's loss, in float64 and in the dtypes of training.

What could break: tokens that do not count, chunks and their sums, the gradient of each term, of an adapter or
of the head itself; roundings more than the whole logits have; logits that exist whole after all.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, assert_as_exact_on_average, error, name_of, noise
from peft_layers import Features, in_float64, peft_layer, projection_of, trainables
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyfastlora.fused import cross_entropy
from pyfastlora.fused.cross_entropy import LossOptions, linear_cross_entropy, token_losses
from pyfastlora.fused.projection import Projection
from pyfastlora.weights.dense import DenseWeight

TOKENS, WIDTH, VOCABULARY = 149, 128, 192
OPTIONS = [
    LossOptions(),
    LossOptions(label_smoothing=0.1),
    LossOptions(softcap=2.0),
    LossOptions(scale=0.25, z_loss=0.02),
    LossOptions(label_smoothing=0.2, z_loss=0.01, softcap=3.0, scale=1.5),
]
HEADS = [
    *(Features(), Features(base_bias=True, train_base_bias=True), Features(dora=True)),
    Features(lora_bias=True, base_bias=True),
]


def labels_of(*shape: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, shape, generator=generator, device="cpu")
    return torch.where(drawn % 5 == 0, -100, drawn).to(DEVICE)


def whole(logits: torch.Tensor, labels: torch.Tensor, o: LossOptions, divisor: float | None) -> torch.Tensor:
    """The loss of whole logits, as transformers computes it, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * o.scale
    if o.softcap is not None:
        z = o.softcap * torch.tanh(z / o.softcap)
    total = F.cross_entropy(z, labels, reduction="sum", label_smoothing=o.label_smoothing)
    counts = labels != o.ignore_index
    total = total + o.z_loss * (torch.logsumexp(z[counts], 1) ** 2).sum()
    return total / (counts.sum() if divisor is None else divisor)


def grads(loss: torch.Tensor, x: torch.Tensor, layer: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*trainables(layer), strict=True)
    found = torch.autograd.grad(loss, (x, *parameters))
    return {"x": found[0], **dict(zip(names, found[1:], strict=True))}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=name_of,
)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=["plain", "capped", "all"])
def test_as_exact_as_peft_with_whole_logits(options, head, dtype, adapter, kind):
    errors: dict[str, list] = {}
    exact_loss = 0.0
    for seed in range(3):
        layer = peft_layer(head, dtype, adapter, kind=kind, inner=WIDTH, outer=VOCABULARY, seed=seed)
        exact = in_float64(layer)
        labels = labels_of(TOKENS, seed=seed)
        inputs = noise(TOKENS, WIDTH, dtype=dtype, seed=seed)
        found = []
        for of, x in ((exact, inputs.double()), (layer, inputs.clone()), (None, inputs.clone())):
            x.requires_grad_()
            if of is None:
                loss = linear_cross_entropy(x, labels, projection_of(layer), options, 77.0)
                assert abs(loss.item() / exact_loss - 1) < 2e-3
            else:
                loss = whole(of(x), labels, options, 77.0)
                exact_loss = loss.item() if of is exact else exact_loss
            found.append(grads(loss, x, of or layer))
        truth, theirs, ours = found
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name
            pair = error(value, truth[name]), error(theirs[name], truth[name])
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        assert_as_exact_on_average(pairs, name)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_gradcheck_of_a_trained_head(options, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LEAST_TOKENS", 2)  # several chunks
    x, w = (noise(n, 6, dtype=torch.float64, seed=n).requires_grad_() for n in (7, 9))
    b, labels = noise(9, dtype=torch.float64).requires_grad_(), labels_of(7, vocabulary=9)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, labels, Projection(DenseWeight(w), b), options), (x, w, b)
    )
    ours = linear_cross_entropy(x, labels, Projection(DenseWeight(w), b), options)
    torch.testing.assert_close(ours, whole(F.linear(x, w, b), labels, options, None))


def test_a_head_that_is_the_embedding_gets_both_gradients():
    weight = noise(VOCABULARY, WIDTH).requires_grad_()
    ids, labels = labels_of(2, 40, seed=1).clamp_min(0), labels_of(2, 40)
    logits = F.linear(F.embedding(ids, weight), weight).flatten(0, 1)
    theirs = whole(logits, labels.flatten(), OPTIONS[0], None)
    ours = linear_cross_entropy(F.embedding(ids, weight), labels, Projection(DenseWeight(weight)))
    (a,), (b,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_under_autocast(dtype):
    layer = peft_layer(Features(), torch.float32, inner=WIDTH, outer=VOCABULARY)
    x, labels = noise(TOKENS, WIDTH).requires_grad_(), labels_of(TOKENS)
    exact = in_float64(layer)
    x64 = x.detach().double().requires_grad_()
    truth = grads(whole(exact(x64), labels, OPTIONS[0], None), x64, exact)
    with torch.autocast(DEVICE.type, dtype):
        theirs = grads(whole(layer(x), labels, OPTIONS[0], None), x, layer)
        ours = grads(linear_cross_entropy(x, labels, projection_of(layer)), x, layer)
    for name, value in ours.items():
        assert_as_exact_on_average([(error(value, truth[name]), error(theirs[name], truth[name]))], name)


def test_what_each_token_adds_and_what_is_right():
    x, labels = noise(3, 50, WIDTH), labels_of(3, 50)
    w = noise(VOCABULARY, WIDTH, seed=2) / 8
    found = token_losses(x, labels, Projection(DenseWeight(w)), divisor=1.0)
    logits = F.linear(x, w)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 50)
    torch.testing.assert_close(found.by_token, wanted)
    torch.testing.assert_close(found.loss, wanted.sum())
    assert found.correct.equal(logits.argmax(-1) == labels) and not found.by_token.requires_grad


def test_run_back_twice_and_scaled():
    """As gradient accumulation and a loss scaler do; powers of two scale exactly."""
    x, labels = noise(TOKENS, WIDTH, dtype=torch.bfloat16).requires_grad_(), labels_of(TOKENS)
    head = Projection(DenseWeight(noise(VOCABULARY, WIDTH, dtype=torch.bfloat16, seed=1) / 8))
    loss = linear_cross_entropy(x, labels, head, divisor=torch.tensor(29, device=DEVICE))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss * 4096, x)
    assert again.equal(first * 4096) and first.abs().sum() > 0
    plain = linear_cross_entropy(x, labels, head, divisor=29)
    assert torch.autograd.grad(plain, x)[0].equal(first)


def test_float16_gradients_survive_a_large_batch():
    """1 / 10 million of a gradient is nothing in float16; a loss scaler brings it back."""
    x, labels = noise(TOKENS, WIDTH, dtype=torch.float16).requires_grad_(), labels_of(TOKENS)
    w = noise(VOCABULARY, WIDTH, dtype=torch.float16) / 8
    loss = linear_cross_entropy(x, labels, Projection(DenseWeight(w)), divisor=1e7)
    (scaled,) = torch.autograd.grad(loss * 2.0**24, x)
    x64 = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(whole(F.linear(x64, w.double()), labels, OPTIONS[0], 1e7), x64)
    assert error(scaled / 2.0**24, exact.float()) < 2e-2 or error(scaled, exact * 2.0**24) < 1e-3


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_none_that_counts(tokens):
    w = noise(VOCABULARY, WIDTH).requires_grad_()
    x = noise(tokens, WIDTH).requires_grad_()
    labels = labels_of(tokens).clamp_min(1)
    loss = linear_cross_entropy(x, labels, Projection(DenseWeight(w)), divisor=2.0)
    torch.testing.assert_close(loss, whole(F.linear(x, w), labels, OPTIONS[0], 2.0))
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert dx.shape == x.shape and (dw.abs().sum() > 0) == (tokens > 0)
    ignored = torch.full_like(labels, -100)
    nothing = linear_cross_entropy(x, ignored, Projection(DenseWeight(w)), divisor=2.0)
    assert nothing == 0 and torch.autograd.grad(nothing, x)[0].abs().sum() == 0
    assert linear_cross_entropy(x, ignored, Projection(DenseWeight(w))).isnan()


class Peak(TorchDispatchMode):
    """The largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.shape:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_logits_never_exist_whole_and_nothing_is_kept_of_them():
    tokens, vocabulary = 4096, 4000
    x, w = noise(tokens, 64).requires_grad_(), noise(vocabulary, 64)
    labels = labels_of(tokens, vocabulary=vocabulary)
    saved: list[int] = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t)
    with Peak() as peak, pack:
        linear_cross_entropy(x, labels, Projection(DenseWeight(w))).backward()
    logits = tokens * vocabulary * 4
    assert peak.largest <= logits / 39
    assert sum(saved) <= x.nbytes + 8 * tokens + 64


def test_nothing_of_a_gradient_without_one(monkeypatch):
    x, labels, w = noise(TOKENS, WIDTH).requires_grad_(), labels_of(TOKENS), noise(VOCABULARY, WIDTH)
    with_it = linear_cross_entropy(x, labels, Projection(DenseWeight(w)))
    monkeypatch.setattr(cross_entropy, "run_backward", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert linear_cross_entropy(x, labels, Projection(DenseWeight(w))).equal(with_it.detach())


def test_what_does_not_fit_is_told():
    x, w = noise(4, WIDTH), noise(VOCABULARY, WIDTH)
    head = Projection(DenseWeight(w))
    with pytest.raises(ValueError, match=r"labels must be \[4\] for x \[4, 128\]; got \[3\]"):
        linear_cross_entropy(x, labels_of(3), head)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 192\) or -100; got 1 to 192"):
        linear_cross_entropy(x, torch.tensor([1, 2, 192, -100], device=DEVICE), head)
    layer = peft_layer(Features(dropout=0.1), torch.float32, inner=WIDTH, outer=VOCABULARY)
    with pytest.raises(ValueError, match="dropout on the head draws its mask over all tokens at once"):
        linear_cross_entropy(x, labels_of(4), projection_of(layer))
    assert linear_cross_entropy(x, labels_of(4), projection_of(deepcopy(layer).eval())).isfinite()
