"""Linears that are fed one tensor: found, run as one node, and given up where they are not fed one after all.

What could break: a stash given to the wrong call, masks drawn in another order than PEFT's, a checkpoint that
saves other tensors when it runs again, a group of what merely looks alike.
"""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from accuracy import DEVICE, noise
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyfastlora
from pyfastlora.patching.groups import Siblings
from pyfastlora.patching.layers import STATE

from .models import WIDTH, lora, with_noise


class Attention(nn.Module):
    """Shapes and calls of an attention without the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, 32, bias=False)
        self.v = nn.Linear(WIDTH, 32)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v], -1).tanh())


ALL = ["q", "k", "v", "o"]


def pair(base: nn.Module | None = None, **config: Any) -> tuple[nn.Module, nn.Module]:
    """(PEFT's model, a patched copy)."""
    theirs = lora(base or Attention(), **{"target_modules": ALL, **config})
    ours = copy.deepcopy(theirs)
    pyfastlora.patch(ours)
    return theirs, ours


def step(model: nn.Module, x: Tensor, seed: int = 0, through: Any = None) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(leaf) if through is None else through(model, leaf)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [leaf, *trained.values()], noise(*y.shape, seed=3))
    return dict(zip(["y", "x", *trained], [y.detach(), *grads], strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def regions(model: nn.Module) -> dict[str, str]:
    return {row.name.rpartition(".")[2]: row.region for row in pyfastlora.report(model)}


def siblings(model: nn.Module) -> Siblings:
    states = [module.__dict__[STATE] for module in model.modules() if STATE in module.__dict__]
    (found,) = {id(state.siblings): state.siblings for state in states}.values()
    return found


GROUPED = dict.fromkeys("qkv", "group q, k, v") | {"o": "linear"}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"rank_pattern": {"k": 3, "v": 17}, "alpha_pattern": {"q": 5}},
        {"lora_bias": True, "target_modules": ["q", "v", "o"], "bias": "lora_only"},
    ],
    ids=["lora", "dropout", "dora", "ranks", "biases"],
)
def test_equal_to_peft_in_every_step(config):
    theirs, ours = pair(**config)
    for seed in range(4):
        x = noise(5, 7, WIDTH, seed=seed)
        assert_same(step(ours, x, seed), step(theirs, x, seed))
        assert not siblings(ours).kept
    names = "q, v" if "target_modules" in config else "q, k, v"
    assert regions(ours)["q"] == f"group {names}"
    assert all(row.calls_fallback == 0 for row in pyfastlora.report(ours))


def test_one_node_instead_of_three():
    _, ours = pair()
    x = noise(5, WIDTH).requires_grad_()
    ours(x)
    y = ours(x)  # its nodes live as long as it does
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
    assert sum("_FusedProjections" in node.name() for node in nodes) == 2  # q, k, v; o


def test_saved_once():
    _, ours = pair()
    x = noise(50, WIDTH).requires_grad_()
    ours(x)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        ours(x)
    assert sum(t.data_ptr() == x.data_ptr() for t in held) == 1


def lora_and_dora() -> nn.Module:
    """LoRA on q, DoRA on k, nothing on v."""
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q"]), Attention())
    layers = inject_adapter_in_model(LoraConfig(r=8, use_dora=True, target_modules=["k"]), Attention())
    model.k = layers.k
    return with_noise(model)


def test_lora_on_one_and_dora_on_another():
    theirs = lora_and_dora()
    ours = copy.deepcopy(theirs)
    pyfastlora.patch(ours)
    for seed in range(3):
        x = noise(6, WIDTH, seed=seed)
        assert_same(step(ours, x, seed), step(theirs, x, seed))
    assert regions(ours) == dict.fromkeys("qk", "group q, k")


class Crossed(Attention):
    """q is fed one tensor, k and v another."""

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(0)
        return self.o(self.q(x) * torch.cat([self.k(other), self.v(other)], -1).tanh())


def test_cross_attention_groups_keys_and_values_only():
    theirs, ours = pair(Crossed())
    for seed in range(3):
        assert_same(step(ours, noise(5, WIDTH, seed=seed)), step(theirs, noise(5, WIDTH, seed=seed)))
    assert regions(ours) == {"q": "linear", "k": "group k, v", "v": "group k, v", "o": "linear"}


class Moody(Attention):
    """k and v come for another tensor, or not at all, when told to."""

    mood = ""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.mood == "absent":
            return self.o(q)
        if self.mood == "changed":
            x.add_(1)
        other = x.flip(0) if self.mood == "other" else x
        if self.mood == "random":
            torch.rand(1)
        return self.o(q * torch.cat([self.k(other), self.v(other)], -1).tanh())


@pytest.mark.parametrize("mood", ["other", "absent"])
def test_a_miss_costs_nothing_but_the_group(mood):
    theirs, ours = pair(Moody())
    x = noise(5, WIDTH)

    for turn in range(5):
        for model in (theirs, ours):
            model.base_model.model.mood = mood if turn == 2 else ""
        run = nn.Module.__call__
        assert_same(step_reachable(ours, x, run), step_reachable(theirs, x, run))
    assert set(regions(ours).values()) == {"linear"}
    assert "grouped no more" in pyfastlora.report(ours)["q"].note


def test_a_tensor_written_in_between_is_another():
    theirs, ours = pair(Moody())
    x = noise(5, WIDTH)
    ours(x), ours(x)
    assert regions(ours) == GROUPED
    for model in (theirs, ours):
        model.base_model.model.mood = "changed"
    with torch.no_grad():
        torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


def step_reachable(model: nn.Module, x: Tensor, run: Any) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    for p in model.parameters():
        p.grad = None
    y = run(model, leaf)
    y.backward(noise(*y.shape, seed=3))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **grads}


def test_no_group_across_a_random_number():
    """It could be a dropout between the two: masks drawn ahead of it would not be PEFT's."""
    theirs, ours = pair(Moody(), lora_dropout=0.5)
    for model in (theirs, ours):
        model.base_model.model.mood = "random"
    for seed in range(3):
        assert_same(step(ours, noise(5, WIDTH), seed), step(theirs, noise(5, WIDTH), seed))
    assert regions(ours) == {"q": "linear", "k": "group k, v", "v": "group k, v", "o": "linear"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpoints_run_again_as_they_ran(reentrant, forwards):
    """Also where the first forward, ungrouped, is run again after a second one has begun."""
    theirs, ours = pair(lora_dropout=0.2)
    again = []

    def through(model, leaf):
        total = 0
        for turn in range(forwards):
            again.append(model)
            total = total + checkpoint(model, leaf * (turn + 1), use_reentrant=reentrant)
        return total

    for seed in range(4):
        x = noise(5, WIDTH, seed=seed)
        results = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            results.append(step_reachable(model, x, through))
        assert_same(*results)
    assert regions(ours) == GROUPED and not siblings(ours).waiting


def test_conditions_of_every_member_count():
    theirs, ours = pair()
    x = noise(5, WIDTH)
    step(ours, x)
    with torch.no_grad():
        for model in (theirs, ours):
            layer = model.base_model.model.v
            layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert_same(step(ours, x), step(theirs, x))
    report = pyfastlora.report(ours)
    assert "a forward hook sits on lora_A" in report["v"].reason
    assert report["q"].calls_fallback == report["k"].calls_fallback == 0


def name_another_adapter(k: Any, x: Tensor) -> Tensor:
    return k(x, adapter_names=["__base__"] * len(x))


def disable(k: Any, x: Tensor) -> Tensor:
    k.enable_adapters(False)
    return k(x)


def write(k: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        k.lora_B["default"].weight.mul_(2)
    return k(x)


def replace(k: Any, x: Tensor) -> Tensor:
    k.lora_A["default"].weight = nn.Parameter(k.lora_A["default"].weight.detach() + 1)
    return k(x)


def scale(k: Any, x: Tensor) -> Tensor:
    k.scaling["default"] *= 3
    return k(x)


def hook(k: Any, x: Tensor) -> Tensor:
    k.lora_A["default"].register_forward_hook(lambda _, __, output: 2 * output)
    return k(x)


class Late(Attention):
    """q alone, and then k as `late` calls it, once that is set."""

    late: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            return super().forward(x)
        q, k = self.q(x), self.late(self.k, x)
        return torch.cat([q, k, self.v(x)], -1)


@pytest.mark.parametrize("late", [name_another_adapter, disable, write, replace, scale, hook])
def test_a_member_that_changes_after_it_was_computed_computes_again(late):
    """q has computed k's output by then: it is not k's any more."""
    theirs, ours = pair(Late())
    x = noise(5, WIDTH)
    ours(x), ours(x)
    assert regions(ours) == GROUPED
    for model in (theirs, ours):
        model.base_model.model.late = late
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    assert pyfastlora.report(ours)["v"].note.startswith("grouped no more: k ")
    assert set(regions(ours).values()) <= {"linear", "none"}


class OneByOne(Attention):
    """One projection a call, once told which."""

    which = ""

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.which)(x) if self.which else super().forward(x)


def one_by_one(model: nn.Module, which: str, x: Tensor) -> Tensor:
    model.base_model.model.which = which
    return model(x)


def test_nothing_is_kept_from_one_forward_to_the_next():
    """Not a graph that has been run back, nor outputs from before a step that bumps no version."""
    theirs, ours = pair(OneByOne())
    x = noise(5, WIDTH).requires_grad_()
    results = []
    for model in (theirs, ours):
        model(x), model(x)
        one_by_one(model, "q", x).sum().backward()
        one_by_one(model, "v", x).sum().backward()
        grouped = one_by_one(model, "q", x)
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True).step()
        results.append((grouped, one_by_one(model, "v", x), x.grad.clone()))
        x.grad = None
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)
    assert not siblings(ours).kept and "did not come for x" in pyfastlora.report(ours)["q"].note


class Abandoned(Attention):
    """Raises between q and the others, once told to."""

    abandons: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.abandons is not None:
            raise self.abandons
        return self.o(q * torch.cat([self.k(x), self.v(x)], -1).tanh())


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_nothing_is_kept_of_a_forward_that_raised(raised):
    """torch calls no hook after an interrupt: the next forward starts afresh all the same."""
    theirs, ours = pair(Abandoned())
    x = noise(5, WIDTH)
    for watched in (True, False):
        ours.base_model.model.abandons = raised
        with pytest.raises(raised):
            ours(x)
        ours.base_model.model.abandons = None
        assert_same(step(ours, x), step(theirs, x))
        assert not siblings(ours).kept and siblings(ours).thread is None and siblings(ours).runs is None
        if watched:
            step(ours, x)
    assert regions(ours) == GROUPED  # that was no miss


@pytest.mark.parametrize("between", [False, True])
def test_a_checkpoint_may_be_run_again_more_than_once(between):
    """Under retain_graph, and for each of two outputs."""
    theirs, ours = pair(lora_dropout=0.2)
    results = []
    for model in (theirs, ours):
        x = noise(5, WIDTH).requires_grad_()
        torch.manual_seed(0)
        y = checkpoint(model, x, use_reentrant=False)
        y.sum().backward(retain_graph=True)
        if between:
            with torch.no_grad():
                model(x)
        y.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)


class Halves(Attention):
    """Two outputs that share nothing but x."""

    def forward(self, x: Tensor) -> Any:
        other = x.flip(0)
        return self.o(self.q(x)), torch.cat([self.k(other), self.v(other)], -1)


def test_a_checkpoint_with_two_outputs_may_be_run_back_in_two_steps():
    theirs, ours = pair(Halves())
    results = []
    for model in (theirs, ours):
        for _ in range(2):
            x = noise(5, WIDTH).requires_grad_()
            first, second = checkpoint(model, x, use_reentrant=False)
            first.sum().backward()
            second.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)


def test_groups_do_not_begin_while_a_checkpoint_is_run_again():
    """The first of two blocks in one has been run back when the second's turn runs both again."""
    blocks = [pair() for _ in range(2)]
    results = []
    for first, second in zip(*blocks, strict=True):
        x = noise(5, WIDTH).requires_grad_()
        outputs = checkpoint(lambda x, a=first, b=second: (a(x), b(x)), x, use_reentrant=False)
        for y in outputs:
            y.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)


def test_merging_lets_go_of_the_layers():
    _, ours = pair()
    x = noise(5, WIDTH)
    step(ours, x), step(ours, x)
    layer = weakref.ref(ours.base_model.model.q)
    base = ours.merge_and_unload()
    base(x)
    del ours
    gc.collect()
    assert layer() is None and not base._forward_hooks and not base._forward_pre_hooks


def test_an_adapter_that_came_later_joins_the_groups():
    theirs, ours = pair(target_modules=["q", "v"])
    x = noise(5, WIDTH)
    step(ours, x), step(ours, x)
    assert regions(ours) == dict.fromkeys("qv", "group q, v")
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.add_adapter("more", LoraConfig(r=3, target_modules=["q", "k", "v", "o"]))
        model.set_adapter("more")
        with_noise(model)
    pyfastlora.patch(ours)
    for _ in range(2):
        assert_same(step(ours, x), step(theirs, x))
    assert regions(ours) == GROUPED
    for model in (theirs, ours):
        model.set_adapter("default")
    assert_same(step(ours, x), step(theirs, x))


class Written(Attention):
    """x is written to between the siblings."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x.add_(1)
        k = self.k(x)
        x.add_(1)
        return self.o(q * torch.cat([k, self.v(x)], -1).tanh())


def test_inference_tensors_have_no_versions_and_are_not_grouped():
    theirs, ours = pair(Written())
    for _ in range(3):
        with torch.inference_mode():
            torch.testing.assert_close(ours(noise(5, WIDTH)), theirs(noise(5, WIDTH)))
    whole, grouped = pair()
    x = noise(5, WIDTH)
    step(grouped, x), step(grouped, x)
    with torch.inference_mode():
        torch.testing.assert_close(grouped(noise(5, WIDTH)), whole(noise(5, WIDTH)))
    assert regions(grouped) == GROUPED


class Dropping(Attention):
    """A dropout of the model's own between two siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.drop(self.q(x))
        return self.o(q * torch.cat([self.k(x), self.v(x)], -1).tanh())


def test_a_group_of_evaluation_is_none_of_training():
    theirs, ours = pair(Dropping(), lora_dropout=0.3)
    for model in (theirs, ours):
        model.eval()
        model(noise(5, WIDTH)), model(noise(5, WIDTH))
        model.train()
    for seed in range(3):
        assert_same(step(ours, noise(5, WIDTH), seed), step(theirs, noise(5, WIDTH), seed))
    assert regions(ours) == {"q": "linear", "k": "group k, v", "v": "group k, v", "o": "linear"}


def want_x(attention: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    return x


def want_v(attention: nn.Module, x: Tensor) -> Tensor:
    attention.v.lora_A["default"].weight.requires_grad_()
    return attention.v.lora_A["default"].weight


class Wanting(Attention):
    """A gradient is asked for after q has computed for all."""

    want: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        self.wanted = self.want(self, x) if self.want else x
        return self.o(q * torch.cat([k, self.v(x)], -1).tanh())


@pytest.mark.parametrize("want", [want_x, want_v])
def test_a_gradient_asked_for_in_between_is_given(want):
    theirs, ours = pair(Wanting())
    for model in (theirs, ours):
        model.base_model.model.v.lora_A["default"].weight.requires_grad_(want is want_x)
        model(noise(5, WIDTH)), model(noise(5, WIDTH))
        model.base_model.model.want = want
        model(noise(5, WIDTH)).square().sum().backward()
    grads = [model.base_model.model.wanted.grad for model in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=2e-4, atol=2e-4)


class Mixed(Attention):
    """q in inference mode, k and v outside."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            with torch.inference_mode():
                self.q(x)
            return self.k(x)
        return super().forward(x)


def test_no_inference_tensor_leaves_its_mode():
    theirs, ours = pair(Mixed())
    x = noise(5, WIDTH)
    for model in (theirs, ours):
        model.eval()
        siblings(ours).learned[False] = [(0, 1, 2)]
    with torch.no_grad():
        y = ours(x)
        torch.testing.assert_close(y, theirs(x))
    assert not y.is_inference()


class Latent(nn.Module):
    """DeepSeek's order of calls: q_b between two that are fed x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_b, self.kv_a = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_b(self.q_a(x).tanh()) * self.kv_a(x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_need_not_be_called_one_after_the_other(dropout):
    """But without a dropout mask of another's drawn in between."""
    theirs, ours = pair(Latent(), target_modules=["q_a", "q_b", "kv_a"], lora_dropout=dropout)
    for seed in range(3):
        x = noise(5, WIDTH, seed=seed)
        assert_same(step(ours, x, seed), step(theirs, x, seed))
    together = {} if dropout else {"q_a": "group q_a, kv_a", "kv_a": "group q_a, kv_a"}
    assert regions(ours) == {"q_a": "linear", "q_b": "linear", "kv_a": "linear"} | together


def test_a_checkpoint_that_is_never_run_again_is_not_waited_for():
    theirs, ours = pair()
    x = noise(5, WIDTH)
    checkpoint(ours, x, use_reentrant=False)  # an evaluation without no_grad
    for _ in range(2):
        assert_same(step(ours, x), step(theirs, x))
    assert regions(ours) == GROUPED and siblings(ours).plans[True] == [(0, 1, 2)]
    kept = checkpoint(ours, x, use_reentrant=False)
    assert len(siblings(ours).waiting) > 0
    del kept
    assert not siblings(ours).waiting


def test_copies_and_pickles_are_on_their_own():
    theirs, ours = pair()
    x = noise(5, WIDTH)
    step(ours, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(step(twin, x), step(theirs, x))
        assert set(regions(twin).values()) == {"linear"}
        pyfastlora.patch(twin)
        step(twin, x), step(twin, x)
        assert regions(twin) == GROUPED
    assert regions(ours)["q"] in ("linear", "group q, k, v")  # untouched by them
    pyfastlora.unpatch(ours)
    assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiles_whole_with_its_groups(autocast):
    """Under autocast too no operation of ours is cast: the backward is none of autocast's."""
    torch._dynamo.reset()
    _, ours = pair()
    x = noise(5, WIDTH)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        step(ours, x)
        eager = step(ours, x)
        assert regions(ours) == GROUPED
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert_same(step(ours, x, through=lambda _, leaf: compiled(leaf)), eager)


def test_four_bit_and_dense_in_one_group():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install pyfastlora[qlora]")
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = Attention()
    layer = bnb.nn.Linear4bit(WIDTH, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(base.k.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    base.k = layer.to(DEVICE)
    base.is_loaded_in_4bit = True
    theirs, ours = pair(base)
    for seed in range(3):
        x = noise(6, WIDTH, seed=seed)
        assert_same(step(ours, x, seed), step(theirs, x, seed))
    assert regions(ours) == GROUPED
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(step(ours, x, through=lambda _, leaf: compiled(leaf)), step(theirs, x))
