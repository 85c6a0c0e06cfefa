"""Feed-forward blocks found by what they compute, and run as one node where nothing is in the way.

What could break: a block taken for one that it is not, a hook or a changed child passed over, masks in
another order, a class that pickle, deepcopy or FSDP2 cannot live with, a way back that ends half way.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, noise, process_group
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GlmConfig, LlamaConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import pyfastlora
from pyfastlora.patching.layers import STATE
from pyfastlora.patching.match import GatedMLP, activation_of, match
from pyfastlora.patching.mlp import FusedMLP

from .models import WIDTH, assert_close, assert_equal, lora, patched_copy, step, with_noise
from .test_patch import snapshot

HIDDEN = 128
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN}
TARGETS = ["gate_proj", "up_proj", "gate_up_proj", "down_proj"]
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SIZES, num_attention_heads=4, mlp_bias=True)),
    "gemma": lambda: GemmaMLP(GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh")),
    "phi3": lambda: Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
    "glm": lambda: GlmMLP(GlmConfig(**SIZES, pad_token_id=0)),
}


class Gated(nn.Module):
    """A feed-forward block of our own; what it computes is `formula`, of the tests that use it."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act = nn.SiLU()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        if self.formula is not None:
            return self.formula(self, x)
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def pair(base: nn.Module | None = None, **config: Any) -> tuple[nn.Module, nn.Module]:
    """(PEFT's model, a patched copy)."""
    peft = lora(base or Gated(), **{"target_modules": TARGETS, **config})
    return peft, patched_copy(peft)


def block(model: nn.Module) -> Any:
    return model.base_model.model


def calls(model: nn.Module) -> tuple[int, int]:
    """(as one node, one by one)."""
    state = block(model).__dict__[STATE]
    return state.calls_fused, state.calls_fallback


def why(model: nn.Module) -> str:
    return block(model).__dict__[STATE].last_reason


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "down only": {"target_modules": ["down_proj"], "bias": "all"},
    "not down": {"target_modules": ["gate_proj", "gate_up_proj"], "lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"up_proj": 3, "down_proj": 17}, "alpha_pattern": {"gate_proj": 5}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_peft_and_one_node(family: str, config: dict[str, Any]) -> None:
    peft, ours = pair(FAMILIES[family](), **config)
    x = noise(2, 5, WIDTH, seed=1)
    for _ in range(2):
        assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (2, 0)
    assert {row.region for row in pyfastlora.report(ours)} == {"mlp"}
    assert {(row.calls_fused, row.calls_fallback, row.note) for row in pyfastlora.report(ours)} == {
        (2, 0, "")
    }
    nodes = {type(ours(x.requires_grad_()).grad_fn).__name__}
    assert any("_FusedMLP" in name or "View" in name for name in nodes)


def test_the_report_says_mlp() -> None:
    _, ours = pair(FAMILIES["llama"]())
    ours(noise(2, WIDTH))
    assert pyfastlora.report(ours)["gate_proj"].region == "mlp"
    assert "fused mlp" in str(pyfastlora.report(ours))


# ---- what counts as one
# ------------------------------------------------------------------------------------------------


def matched(formula: Callable[[Any, Tensor], Tensor]) -> GatedMLP | str:
    return match(Gated(formula))


def _other_way(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(torch.mul(m.up_proj(x), m.act(m.gate_proj(x))))


def _with_functions(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.gelu(m.gate_proj(x), approximate="tanh").mul(m.up_proj(x)))


GATED = {
    "gate first": (None, True, ""),
    "up first": (_other_way, False, ""),
    "functions": (_with_functions, True, "gelu_tanh"),
}


@pytest.mark.parametrize(("formula", "gate_first", "act"), GATED.values(), ids=GATED)
def test_gated_in_any_order(formula: Any, gate_first: bool, act: str) -> None:
    names = ("gate_proj", "up_proj") if gate_first else ("up_proj", "gate_proj")
    found = matched(formula)
    assert found == GatedMLP("x", names, "down_proj", gate_first, act, "" if act else "act")
    # the masks are drawn in the order of the calls
    peft, ours = pair(Gated(formula), lora_dropout=0.4)
    x = noise(3, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 0)


def _limited(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.act(m.gate_proj(x).clamp(max=7.0)) * m.up_proj(x))


def _scaled(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.act(m.gate_proj(x)) * m.up_proj(x) * 0.5)


def _dropped(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.dropout(m.act(m.gate_proj(x)) * m.up_proj(x), 0.1, m.training))


def _only_in_training(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.gate_proj(x)) * m.up_proj(x)
    return m.down_proj(h if m.training else h.clamp(-9, 9))


def _only_with_gradients(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.gate_proj(x)) * m.up_proj(x)
    return m.down_proj(h if torch.is_grad_enabled() else h.clamp(-9, 9))


def _counting(m: Any, x: Tensor) -> Tensor:
    m.count = getattr(m, "count", 0) + 1
    return m.down_proj(m.act(m.gate_proj(x)) * m.up_proj(x))


def _in_place(m: Any, x: Tensor) -> Tensor:
    x.clamp_(-1, 1)
    return m.down_proj(m.act(m.gate_proj(x)) * m.up_proj(x))


def _branching(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.act(m.gate_proj(x)) * m.up_proj(x)) if x.sum() > 0 else x


NOT_GATED = {
    "it has clamp in it": _limited,
    "it has clamp_ in it": _in_place,
    "it has a further factor in it": _scaled,
    "it has dropout in it": _dropped,
    "its forward is another one in evaluation": _only_in_training,
    "its forward is another one in evaluation or without gradients": _only_with_gradients,
    "its forward changes the module": _counting,
    "its forward cannot be traced": _branching,
    "it combines them in another way": lambda m, x: m.down_proj(m.act(m.gate_proj(x)) * m.act(m.up_proj(x))),
    "it has add in it": lambda m, x: m.down_proj(m.act(m.gate_proj(x)) * (m.up_proj(x) + 1)),
    "it combines them in another": lambda m, x: m.down_proj(
        m.act(m.gate_proj(x.flip(0) if False else x)) * x
    ),
    "it has sigmoid in it": lambda m, x: m.down_proj(torch.sigmoid(m.gate_proj(x)) * m.up_proj(x)),
    "it has flip in it": lambda m, x: m.down_proj(m.act(m.gate_proj(x.flip(0))) * m.up_proj(x)),
}


@pytest.mark.parametrize("reason", NOT_GATED)
def test_another_formula_is_left_alone_with_the_reason(reason: str) -> None:
    module = Gated(NOT_GATED[reason])
    before = snapshot(module)
    found = match(module)
    assert isinstance(found, str) and reason in found
    assert snapshot(module) == before


def test_the_reason_is_in_the_report_and_the_linears_run_fused() -> None:
    peft, ours = pair(Gated(_limited))
    x = noise(3, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    assert type(block(ours)) is Gated
    row = pyfastlora.report(ours)["gate_proj"]
    assert row.fused and row.region != "mlp" and "it has clamp in it" in row.note


VARIANTS = {
    "clamped": ("deepseek_v4", "DeepseekV4MLP", {"swiglu_limit": 0.1}, "it has clamp in it"),
    "scaled": ("falcon_h1", "FalconH1MLP", {"mlp_multipliers": (0.7, 1.3)}, "it has a further factor in it"),
    "normalised": ("bitnet", "BitNetMLP", {"rms_norm_eps": 1e-6}, "it has BitNetRMSNorm in it"),
}


@pytest.mark.parametrize(("family", "name", "config", "reason"), VARIANTS.values(), ids=VARIANTS)
def test_transformers_own_variants_are_refused(
    family: str, name: str, config: dict[str, Any], reason: str
) -> None:
    modelling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    config = {**SIZES, "hidden_act": "silu", "mlp_bias": False, **config}
    peft, ours = pair(getattr(modelling, name)(SimpleNamespace(**config)))
    x = noise(3, WIDTH)
    for _ in range(2):
        assert_close(step(ours, x), step(peft, x))
    rows = list(pyfastlora.report(ours))
    assert all(row.fused and row.region != "mlp" and reason in row.note for row in rows)


class Optional(nn.Module):
    """A gated block that clamps where an attribute says so."""

    clamps = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)
        self.bound = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h if self.bound is None else h.clamp(-self.bound, self.bound))


def another_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x) * 2)


def test_a_block_that_was_changed_since_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    peft, ours = pair(Optional())
    x = noise(3, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 0)
    for model in (peft, ours):
        block(model).bound = 0.1
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 1) and "its bound was changed since" in why(ours)
    for model in (peft, ours):
        block(model).bound, block(model).more = None, 1
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 2) and "its more came or went since" in why(ours)
    for model in (peft, ours):
        del block(model).more
    monkeypatch.setattr(Optional, "forward", another_forward)
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 3) and "Optional.forward was replaced since" in why(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(step(twin, x), step(peft, x))
        assert calls(twin) == (1, 4)
    pyfastlora.unpatch(ours)
    pyfastlora.patch(ours)
    assert_close(step(ours, x), step(peft, x))
    assert "further factor" in pyfastlora.report(ours)["gate_proj"].note


ACTIVATIONS: dict[str, Any] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "swish": None,
    "gelu_pytorch_tanh": None,
    "relu2": None,
}
NAMES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_told_by_what_they_are(name: str) -> None:
    from transformers.activations import ACT2FN

    made = {name: ACTIVATIONS[name]() if ACTIVATIONS[name] else ACT2FN[name]}
    if name in ACT2FN:
        made["transformers"] = ACT2FN[name]
    for module in made.values():
        assert activation_of(module) == NAMES.get(name, name)
        base = Gated()
        base.act = module
        peft, ours = pair(base)
        x = noise(3, WIDTH) * 3
        assert_close(step(ours, x), step(peft, x))
        assert calls(ours) == (1, 0)


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "gelu_10", "gelu_python_tanh", "mish", "tanh"])
def test_other_activations_are_refused(name: str) -> None:
    from transformers.activations import ACT2FN

    base = Gated()
    base.act = ACT2FN[name]
    found = match(base)
    assert (
        isinstance(found, str) and f"its activation is a {type(base.act).__name__}; fused are silu" in found
    )
    assert activation_of(nn.SiLU(inplace=True)) is None


@pytest.mark.parametrize(
    "config", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=["lora", "dropout", "dora"]
)
def test_verified_as_a_whole(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfastlora.patching import mlp

    model = lora(Gated(), target_modules=["gate_proj", "down_proj"], **config)
    state = torch.get_rng_state()
    found = pyfastlora.patch(model, verify=True)
    assert {row.region for row in found} == {"mlp"} and all(0 < row.error < 1e-5 for row in found)
    assert calls(model) == (0, 0) and torch.equal(torch.get_rng_state(), state)
    pyfastlora.unpatch(model)
    real = mlp.fused_mlp
    monkeypatch.setattr(mlp, "fused_mlp", lambda *args, **kwargs: real(*args, **kwargs) * 1.01)
    found = pyfastlora.patch(model, verify=True)
    assert type(block(model)) is Gated
    assert all(row.fused and row.region != "mlp" and "off PEFT, above" in row.note for row in found)


# ---- conditions at every call
# ------------------------------------------------------------------------------------------


def _hook_on(child: str, kind: str = "register_forward_hook") -> Callable[[Any], None]:
    def act(mlp: Any) -> None:
        getattr(mlp.get_submodule(child), kind)(lambda *_: None)

    return act


def _replace_forward(mlp: Any) -> None:
    mlp.up_proj.forward = functools.partial(type(mlp.up_proj).forward, mlp.up_proj)


def _another_linear(mlp: Any) -> None:
    class Other(nn.Linear):
        pass

    mlp.up_proj.__class__ = Other


def _train_a_base(mlp: Any) -> None:
    mlp.up_proj.weight.requires_grad_()


def _another_activation(mlp: Any) -> None:
    mlp.act = nn.Tanh()


def _hook_on_activation(mlp: Any) -> None:
    mlp.act.register_forward_hook(lambda *args: args[-1] * 2)


ACTS = {
    "gate_proj: a forward hook sits on the layer itself": _hook_on("gate_proj"),
    "down_proj: a forward hook sits on the layer itself": _hook_on("down_proj", "register_forward_pre_hook"),
    "up_proj: a forward hook sits on the layer itself": _hook_on("up_proj"),
    "up_proj: a backward hook sits on the layer itself": _hook_on("up_proj", "register_full_backward_hook"),
    "gate_proj: a forward hook sits on lora_A": _hook_on("gate_proj.lora_A.default"),
    "up_proj: forward was replaced on the layer itself by a partial": _replace_forward,
    "up_proj: a Other is neither a patched LoRA layer nor a plain linear": _another_linear,
    "up_proj: base_layer.weight requires grad": _train_a_base,
    "act is another activation than it was, or has a hook": _another_activation,
    "act is another activation than it was, or has a hook ": _hook_on_activation,
}


@pytest.mark.parametrize("reason", ACTS)
def test_what_rules_one_child_out_leaves_the_block_to_run_one_by_one(reason: str) -> None:
    peft, ours = pair(target_modules=["gate_proj", "down_proj"], lora_dropout=0.2)
    x = noise(4, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    for model in (peft, ours):
        ACTS[reason](block(model))
    assert_close(step(ours, x), step(peft, x))
    assert calls(ours) == (1, 1) and why(ours).startswith(reason.strip())
    assert f"mlp one by one: {reason.strip()}" in pyfastlora.report(ours)["down_proj"].note


def test_hooks_on_the_block_itself_run_as_before() -> None:
    seen: list[str] = []
    peft, ours = pair()
    for name, model in (("peft", peft), ("ours", ours)):
        block(model).register_forward_hook(lambda m, args, y, name=name: seen.append(name) or y * 2)
    assert isinstance(block(ours), Gated)  # what transformers' recorders look for
    x = noise(4, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    assert seen == ["ours", "peft"] and calls(ours) == (1, 0)


def test_adapters_disabled_merged_switched_and_added() -> None:
    peft, ours = pair(target_modules=["gate_proj", "down_proj"])
    x = noise(4, WIDTH)
    for model in (peft, ours):
        model.add_adapter("more", LoraConfig(r=3, target_modules=["up_proj", "down_proj"]))
        with_noise(model)
    assert_close(step(ours, x), step(peft, x))
    assert why(ours) == "up_proj: a Linear is neither a patched LoRA layer nor a plain linear"
    pyfastlora.patch(ours)
    assert_close(step(ours, x), step(peft, x))
    assert why(ours) == "up_proj: no active adapter on this layer; it has more"
    with peft.disable_adapter(), ours.disable_adapter():
        assert_equal({"y": ours(x)}, {"y": peft(x)})
    for model in (peft, ours):
        model.merge_adapter()
    assert_close({"y": ours(x)}, {"y": peft(x)})
    assert "merged" in why(ours)
    for model in (peft, ours):
        model.unmerge_adapter()
    assert_close(step(ours, x), step(peft, x))
    merged = [model.merge_and_unload() for model in (peft, ours)]
    assert_equal({"y": merged[1](x)}, {"y": merged[0](x)})
    pyfastlora.unpatch(merged[1])
    assert type(merged[1]) is Gated and merged[1].__dict__.keys() == merged[0].__dict__.keys()


def test_calls_by_name_and_with_more() -> None:
    peft, ours = pair(FAMILIES["phi3"]())
    x = noise(4, WIDTH)
    assert_close({"y": block(ours)(hidden_states=x)}, {"y": block(peft)(hidden_states=x)})
    assert calls(ours) == (1, 0)
    for model in (peft, ours):
        with pytest.raises(TypeError, match="hidden_states|positional"):
            block(model)(x, x)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("packed", [("gate_proj",), ("up_proj", "down_proj")], ids="+".join)
def test_four_bit_beside_dense(packed: tuple[str, ...], autocast: bool) -> None:
    """up has no adapter: it is a plain linear of either sort."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install pyfastlora[qlora]")
    base = Gated()
    for name in packed:
        dense = base.get_submodule(name)
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, torch.float32, quant_type="nf4"
        )
        values = dense.weight.data
        layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", module=layer)
        if dense.bias is not None:
            layer.bias = dense.bias
        setattr(base, name, layer.to(DEVICE))
    base.is_loaded_in_4bit = True
    peft, ours = pair(base, target_modules=["gate_proj", "down_proj"])
    x = noise(4, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        want, dtype = step(peft, x), torch.bfloat16 if autocast else torch.float32
        assert_close(step(ours, x), want, dtype=dtype)
        assert calls(ours) == (1, 0)
        got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
        assert_close(got, want, dtype=dtype)


# ---- what else runs modules, copies them and changes their class
# --------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_checkpoints(family: str, reentrant: bool) -> None:
    peft, ours = pair(FAMILIES[family](), lora_dropout=0.3)

    class Through(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    x = noise(4, WIDTH)
    for seed in range(2):
        assert_close(step(Through(ours), x, seed=seed), step(Through(peft), x, seed=seed))
    assert calls(ours) == (4 if reentrant else 2, 0)  # a recomputation ends once it has what was saved


@pytest.mark.parametrize("config", [{"lora_dropout": 0.2}, {"use_dora": True}], ids=["dropout", "dora"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_one_graph_under_torch_compile(family: str, config: dict[str, Any]) -> None:
    torch._dynamo.reset()
    _, ours = pair(FAMILIES[family](), target_modules=["gate_proj", "gate_up_proj", "down_proj"], **config)
    x = noise(4, WIDTH)
    want = step(ours, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = step(compiled, x)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


def test_functorch_sees_pefts_own_operations() -> None:
    peft, ours = pair()
    x = noise(4, WIDTH)
    got, want = (torch.func.vmap(model)(x) for model in (ours, peft))
    torch.testing.assert_close(got, want)
    assert calls(ours) == (0, 1) and "torch.func" in why(ours)


def test_patching_twice_and_back() -> None:
    peft = lora(Gated(), target_modules=TARGETS)
    before, x = snapshot(peft), noise(4, WIDTH)
    for _ in range(2):
        pyfastlora.patch(peft)
        kind = type(block(peft))
        assert issubclass(kind, Gated) and issubclass(kind, FusedMLP)
        peft(x)
        pyfastlora.patch(peft, backend="reference")
        assert type(block(peft)) is kind and calls(peft) == (1, 0)
        pyfastlora.unpatch(peft)
        assert snapshot(peft) == before
    other = Gated()
    assert type(other) is Gated and Gated.forward.__qualname__ == "Gated.forward"


def test_pickle_deepcopy_and_save() -> None:
    peft, ours = pair(FAMILIES["llama"](), lora_dropout=0.1)
    x = noise(4, WIDTH)
    assert list(ours.state_dict()) == list(peft.state_dict())
    want = step(peft, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(block(twin)) is type(block(ours))
        assert_close(step(twin, x), want)
        assert calls(twin) == (1, 0)
        pyfastlora.unpatch(twin)
        assert type(block(twin)) is LlamaMLP
        assert_equal(step(twin, x), want)
    assert calls(ours) == (0, 0)


def test_a_backend_holds_for_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfastlora.ops import _registry
    from pyfastlora.patching import mlp

    seen = []
    real = mlp.fused_mlp
    monkeypatch.setattr(
        mlp, "fused_mlp", lambda *a, **k: seen.append(dict(_registry._requests)) or real(*a, **k)
    )
    peft = lora(Gated(), target_modules=TARGETS)
    ours = patched_copy(peft, backend="reference")
    x = noise(4, WIDTH)
    assert_close(step(ours, x), step(peft, x))
    assert seen == [{"*": "reference"}]
    block(ours).up_proj.__dict__[STATE].backend = "auto"
    assert_close(step(ours, x), step(peft, x))
    assert why(ours) == "its linears were patched for different backends"


def test_fsdp2_composes() -> None:
    from torch.distributed.fsdp import fully_shard

    peft = lora(Gated(), target_modules=TARGETS)
    x = noise(3, WIDTH)
    with process_group() as mesh:
        ours = patched_copy(peft)
        fully_shard(block(ours), mesh=mesh)
        mine = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in step(ours, x).items()}
        assert_close(mine, step(peft, x))
        assert calls(ours) == (1, 0)
        with pytest.raises(RuntimeError, match="became a FSDPFastLoraGated .*unpatch before fully_shard"):
            pyfastlora.unpatch(ours)


def test_gate_and_up_group_when_the_block_does_not_run() -> None:
    peft, ours = pair()
    for model in (peft, ours):
        _hook_on("down_proj")(block(model))
    for seed in range(3):
        x = noise(4, WIDTH, seed=seed)
        assert_close(step(ours, x), step(peft, x))
    assert pyfastlora.report(ours)["up_proj"].region == "group gate_proj, up_proj"
    assert calls(ours) == (0, 3)


def test_data_parallel_replicas_run_their_own_tensors() -> None:
    peft, ours = pair()

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 2)
        return replica

    x = noise(4, WIDTH)
    assert_close({"y": replicate(block(ours))(x)}, {"y": replicate(block(peft))(x)})
    assert calls(ours) == (1, 0)
