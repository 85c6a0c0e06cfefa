"""What a PEFT user can reach: inits, optimizers, ranks, adapters, variants, shapes and modes.

What could break: a value kept from an earlier step, a formula for one init or rank only, a shape or a
layout that the kernels read otherwise, a mode that sees other tensors than PEFT's, a variant that is taken
for plain LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import DEVICE, bitsandbytes
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyfastlora

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
    with_noise,
)
from .test_training import adapted, llama

BOTH = ["up", "down"]
LORA_AND_DORA = pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
BASES = pytest.mark.parametrize("build", [Toy, toy_4bit], ids=["dense", "4-bit"])


def pair(base: nn.Module | None = None, **config: Any) -> tuple[PeftModel, PeftModel]:
    """(PEFT's model, a patched copy)."""
    peft = lora(base, **config)
    return peft, patched_copy(peft)


def assert_fused(model: nn.Module) -> None:
    for each in pyfastlora.report(model):
        assert each.fused and each.calls_fused > 0 and each.calls_fallback == 0, each


def assert_same_now(ours: PeftModel) -> None:
    """A step of the patched model is that of a copy that PEFT runs alone: no former weights are left."""
    peft = copy.deepcopy(ours)
    pyfastlora.unpatch(peft)
    x = inputs(4, WIDTH)
    assert_close(step(ours, x), step(peft, x))


# ---- what the adapter is and how it begins
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BASES
def test_dora_with_magnitudes_of_zero(build: Callable[[], nn.Module], dropout: float) -> None:
    peft = lora(build(), use_dora=True, lora_dropout=dropout)
    with torch.no_grad():
        first(peft).lora_magnitude_vector["default"].weight[::3] = 0
    ours = patched_copy(peft)
    found, expected = step(ours, inputs(5, WIDTH)), step(peft, inputs(5, WIDTH))
    assert all(value.isfinite().all() for value in found.values())
    assert found["base_model.model.up.lora_magnitude_vector.default.weight"][::3].all()
    assert_close(found, expected)
    assert_fused(ours)


@pytest.mark.parametrize("rank", [1, 3, 512])
@LORA_AND_DORA
@BASES
def test_ranks(build: Callable[[], nn.Module], config: dict[str, Any], rank: int) -> None:
    peft, ours = pair(build(), r=rank, lora_alpha=rank, **config)
    assert_close(step(ours, inputs(3, 5, WIDTH)), step(peft, inputs(3, 5, WIDTH)))
    assert_fused(ours)


def test_a_rank_and_an_alpha_for_each_layer() -> None:
    peft, ours = pair(rank_pattern={"up": 3}, alpha_pattern={"down": 40})
    assert_close(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))
    assert_fused(ours)


def _eva(base: nn.Module) -> PeftModel:
    from peft import EvaConfig, initialize_lora_eva_weights

    settings = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    model = get_peft_model(base, LoraConfig(r=8, target_modules=BOTH, **settings))
    initialize_lora_eva_weights(
        model,
        [inputs(64, WIDTH, seed=seed) for seed in range(8)],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        show_progress_bar=False,
    )
    return model


def _corda(base: nn.Module) -> PeftModel:
    from peft.tuners.lora.corda import preprocess_corda

    settings = {"init_lora_weights": "corda", "corda_config": lora_config.CordaConfig(corda_method="kpm")}
    config = LoraConfig(r=8, target_modules=BOTH, **settings)

    def run() -> None:
        for seed in range(8):
            base(inputs(64, WIDTH, seed=seed))

    preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config)


def _loftq(base: nn.Module) -> PeftModel:
    """PEFT computes it on a GPU whether there is one or not: here on the device of the tests."""
    from peft import LoftQConfig

    bitsandbytes()
    own = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(DEVICE if str(arg) == "cuda" else arg for arg in args)
        kwargs = {name: DEVICE if str(value) == "cuda" else value for name, value in kwargs.items()}
        return own(tensor, *args, **kwargs)

    settings = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    weight = base.up.weight.data.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", to)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=BOTH, **settings))
    up = first(model)
    rest = weight - up.base_layer.weight.data  # what the quantised weight lacks, and B A gives in part
    factors = up.lora_B["default"].weight @ up.lora_A["default"].weight
    assert 0 < (rest - factors).norm() < 0.95 * rest.norm()
    return model


def _by_name(name: Any, **config: Any) -> Callable[[nn.Module], PeftModel]:
    settings = {"r": 8, "target_modules": BOTH, "init_lora_weights": name, **config}
    return lambda base: get_peft_model(base, LoraConfig(**settings))


INITS: dict[str, Callable[[nn.Module], PeftModel]] = {
    **{name: _by_name(name) for name in ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal")},
    "rslora": _by_name(True, use_rslora=True),
    "random": _by_name(False),
    "dora over pissa": _by_name("pissa", use_dora=True),
    "eva": _eva,
    "corda": _corda,
    "loftq": _loftq,
}


@pytest.mark.parametrize("build", INITS.values(), ids=INITS)
def test_inits(build: Callable[[nn.Module], PeftModel]) -> None:
    """Also those that take their part out of the base weight; at first with the B that the init made."""
    torch.manual_seed(0)
    peft = build(Toy())
    ours = patched_copy(peft)
    for turn in range(2):
        found, expected = (step(model, inputs(4, WIDTH, seed=turn)) for model in (ours, peft))
        for name in [name for name, value in expected.items() if not value.any()]:
            del expected[name]
            assert not found.pop(name).any(), name  # dA where B is 0
        assert_close(found, expected)
        for model in (peft, ours):
            with_noise(model)
    assert_fused(ours)


# ---- steps, and whatever else changes weights
# ----------------------------------------------------------------------------------------------------


def _adamw(**options: Any) -> Callable[[PeftModel], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.02, **options
    )


def _bnb(name: str) -> Callable[[PeftModel], torch.optim.Optimizer]:
    def make(model: PeftModel) -> torch.optim.Optimizer:
        optimizer = getattr(bitsandbytes().optim, name)
        # 8-bit states for tensors of any size: by default the small ones here would have 32-bit ones
        return optimizer([p for p in model.parameters() if p.requires_grad], lr=0.02, min_8bit_size=0)

    return make


OPTIMIZERS: dict[str, Callable[[PeftModel], torch.optim.Optimizer]] = {
    "default": _adamw(),
    "foreach": _adamw(foreach=True),
    "fused": _adamw(fused=True),
    "8-bit": _bnb("AdamW8bit"),
    "paged": _bnb("PagedAdamW"),
    "LoRA+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@LORA_AND_DORA
@BASES
def test_after_real_steps(
    build: Callable[[], nn.Module], config: dict[str, Any], make: Callable[[PeftModel], torch.optim.Optimizer]
) -> None:
    """A norm or a product kept from before would show; not every one of them raises `Tensor._version`."""
    ours = lora(build(), lora_bias=not config, **config)
    pyfastlora.patch(ours)
    optimizer = make(ours)
    weight = first(ours).lora_B["default"].weight
    for seed in range(3):
        before = weight.detach().clone()
        step(ours, inputs(4, WIDTH, seed=seed))
        optimizer.step()
        assert difference(weight.detach(), before) > 1e-3
        assert_same_now(ours)
    assert_fused(ours)


def _write_data(model: PeftModel) -> None:
    for layer in (first(model), model.base_model.model.down):
        layer.lora_B["default"].weight.data.mul_(-2)
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.flip(0) * 3


def _load(model: PeftModel) -> None:
    state = {name: value.flip(0) * 2 for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False)


def _load_adapter(model: PeftModel) -> None:
    state = {name: value * 1.5 for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)


def _new_base(model: PeftModel) -> None:
    weight = first(model).base_layer.weight
    weight.data = weight.data.flip(0).contiguous()


@pytest.mark.parametrize("change", [_write_data, _load, _load_adapter, _new_base])
@LORA_AND_DORA
@BASES
def test_after_weights_were_written(
    build: Callable[[], nn.Module], config: dict[str, Any], change: Callable[[PeftModel], None]
) -> None:
    ours = lora(build(), **config)
    pyfastlora.patch(ours)
    before = step(ours, inputs(4, WIDTH))
    change(ours)
    assert difference(step(ours, inputs(4, WIDTH))["output"], before["output"]) > 1e-2
    assert_same_now(ours)


# ---- several adapters
# ----------------------------------------------------------------------------------------------------


def test_a_llama_whose_adapters_change_on_the_way() -> None:
    """With groups of q, k, v and gate, up in place: a switch, two at once, none, merged and back."""
    peft = adapted(llama())
    second = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    peft.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **second))
    with_noise(peft, 0.05)
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    tokens = torch.arange(3, 27).view(2, 12)
    acts: list[Callable[[PeftModel], Any]] = [
        lambda model: None,
        lambda model: model.set_adapter("second"),
        lambda model: model.set_adapter("default"),
        lambda model: model.base_model.set_adapter(["default", "second"]),
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("default"),
        lambda model: model.delete_adapter("second"),
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (peft, ours)]
    for act in acts:
        found = []
        for model, optimizer in zip((peft, ours), optimizers, strict=True):
            act(model)
            loss = model(input_ids=tokens, labels=tokens).loss
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        assert found[1] == pytest.approx(found[0], rel=1e-5)
    report = pyfastlora.report(ours)["layers.0.self_attn.q_proj"]
    assert report.fused and (report.calls_fused, report.calls_fallback) == (8, 3)


def test_a_mixed_batch_between_the_calls_of_a_group() -> None:
    peft = adapted(llama()).eval()
    peft.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    with_noise(peft, 0.05)
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    tokens, names = torch.arange(3, 39).view(3, 12), ["second", "__base__", "default"]
    for given in ({}, {}, {"adapter_names": names}, {}):
        with torch.no_grad():
            assert_close({"y": ours(tokens, **given).logits}, {"y": peft(tokens, **given).logits})
    report = pyfastlora.report(ours)["layers.0.self_attn.q_proj"]
    assert (report.calls_fused, report.calls_fallback) == (3, 1)
    assert "called with adapter_names" in report.reason


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [3, 5, 8]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"bias": "lora_only"},
    ],
    ids=["trainable tokens", "modules_to_save", "bias"],
)
def test_what_trains_beside_the_adapters(config: dict[str, Any]) -> None:
    peft = adapted(llama(), **config)
    ours = copy.deepcopy(peft)
    pyfastlora.patch(ours)
    tokens = torch.arange(3, 27).view(2, 12)
    for _ in range(3):
        grads = []
        for model in (peft, ours):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert_close(grads[1], grads[0])
    assert_fused(ours)


# ---- variants that are PEFT's
# ----------------------------------------------------------------------------------------------------

_VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    "MiCA": ({"init_lora_weights": "mica"}, "MiCALinearVariant"),
    "BdLoRA": (
        {"use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["up"], nblocks=2, match_strict=False)},
        "BdLoraLinearVariant",
    ),
    "KaSA": ({"kasa_config": lora_config.KasaConfig()}, "KasaLinearVariant"),
    "VeLoRA": (
        {"velora_config": lora_config.VeloraConfig(num_groups=2, init_type="batch_average")},
        "VeloraLinearVariant",
    ),
    "MonteCLoRA": (
        {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)},
        "MontecloraLinearVariant",
    ),
}


@pytest.mark.parametrize(("config", "variant"), _VARIANTS.values(), ids=_VARIANTS)
def test_variants_run_pefts_forward(config: dict[str, Any], variant: str) -> None:
    peft, ours = pair(**config)
    for seed in range(2):
        x = inputs(4, WIDTH, seed=seed)
        assert_equal(step(first(ours), x, seed=seed), step(first(peft), x, seed=seed))
    found = row(ours)
    assert (found.fused, found.calls_fused, found.calls_fallback) == (False, 0, 2)
    assert variant in found.reason, found.reason


def test_arrow_runs_pefts_forward(tmp_path: Path) -> None:
    from peft import ArrowConfig, create_arrow_model

    for name in ("one", "two"):
        lora(adapter="default", r=4).save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    peft = create_arrow_model(Toy(), paths, ArrowConfig(top_k=1)).eval()
    ours = patched_copy(peft)
    x = inputs(4, WIDTH)
    with torch.no_grad():
        assert torch.equal(ours(x), peft(x))
    assert not row(ours).fused and "Arrow" in row(ours).reason


# ---- shapes and layouts
# ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "2-D": lambda: inputs(7, WIDTH),
    "3-D": lambda: inputs(2, 3, WIDTH),
    "4-D": lambda: inputs(2, 1, 3, WIDTH),
    "one token": lambda: inputs(1, 1, WIDTH),
    "empty": lambda: inputs(2, 0, WIDTH),
    "columns apart": lambda: inputs(WIDTH, 7).t(),
    "rows apart": lambda: inputs(6, 2 * WIDTH)[:, 5 : 5 + WIDTH],
    "batch inside": lambda: inputs(3, 5, WIDTH).transpose(0, 1),
    "expanded": lambda: inputs(1, WIDTH).expand(5, WIDTH),
}

GRADIENTS: tuple[Callable[..., Tensor], ...] = (
    inputs,
    lambda *shape: inputs(*reversed(shape)).permute(*reversed(range(len(shape)))),  # columns apart
    lambda *shape: inputs(*(1,) * len(shape)).expand(shape),  # what .sum() sends back
)


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "config",
    [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}],
    ids=["lora", "dropout", "dora", "dora, dropout"],
)
@BASES
def test_shapes_and_layouts(
    build: Callable[[], nn.Module], config: dict[str, Any], make: Callable[[], Tensor]
) -> None:
    """Of x, and of the gradient: with its columns apart, and all of it one number."""
    peft, ours = pair(build(), **config)
    for gradient in GRADIENTS:
        found = []
        for model in (ours, peft):
            leaf = make().detach().requires_grad_()
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            y = first(model)(leaf)
            y.backward(gradient(*y.shape))
            grads = {name: p.grad for name, p in first(model).named_parameters() if p.grad is not None}
            found.append({"y": y.detach(), "x": leaf.grad, **grads})
        assert found[0].keys() == found[1].keys()
        for name, value in found[1].items():
            assert found[0][name].shape == value.shape and found[0][name].stride() == value.stride(), name
            torch.testing.assert_close(found[0][name], value, rtol=2e-5, atol=2e-5)
    assert (row(ours).calls_fused, row(ours).calls_fallback) == (3, 0), row(ours)


# ---- modes
# ----------------------------------------------------------------------------------------------------


@LORA_AND_DORA
@BASES
def test_activations_that_live_elsewhere(build: Callable[[], nn.Module], config: dict[str, Any]) -> None:
    """Saved-tensor hooks see what is saved for the backward, and what they return is what is used."""
    peft, ours = pair(build(), lora_dropout=0.2, **config)
    with torch.autograd.graph.save_on_cpu():
        assert_close(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))

    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        assert_close(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))
    assert sum(seen) > 4 * WIDTH
    assert_fused(ours)


@LORA_AND_DORA
def test_two_backwards_over_a_retained_graph(config: dict[str, Any]) -> None:
    peft, ours = pair(lora_dropout=0.2, **config)
    found = []
    for model in (ours, peft):
        leaf = inputs(4, WIDTH).requires_grad_()
        torch.manual_seed(1)
        y = model(leaf)
        y.backward(inputs(4, WIDTH, seed=8), retain_graph=True)
        y.backward(inputs(4, WIDTH, seed=9))
        found.append(
            {"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
        )
    assert_close(*found)
    assert_fused(ours)


@LORA_AND_DORA
@BASES
def test_inference_mode(build: Callable[[], nn.Module], config: dict[str, Any]) -> None:
    peft, ours = pair(build(), **config)
    with torch.inference_mode():
        x = inputs(4, WIDTH)
        assert_close({"y": ours(x)}, {"y": peft(x)})
    assert_close(step(ours, inputs(4, WIDTH)), step(peft, inputs(4, WIDTH)))  # and training goes on
    assert_fused(ours)


@LORA_AND_DORA
def test_functional_call(config: dict[str, Any]) -> None:
    peft, ours = pair(**config)
    found = []
    for model in (ours, peft):
        adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
        values = {name: (p * 1.5).detach().requires_grad_() for name, p in adapter.items()}
        y = torch.func.functional_call(model, values, (inputs(4, WIDTH),))
        grads = torch.autograd.grad(y, list(values.values()), inputs(4, WIDTH, seed=8))
        found.append({"y": y.detach(), **dict(zip(values, grads, strict=True))})
    assert_close(*found)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@LORA_AND_DORA
@BASES
def test_checkpoints_under_autocast_with_offloading(
    build: Callable[[], nn.Module], config: dict[str, Any], reentrant: bool
) -> None:
    peft, ours = pair(build(), lora_dropout=0.3, **config)
    found = []
    for model in (ours, peft):
        leaf = inputs(4, WIDTH).requires_grad_()
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, torch.bfloat16), torch.autograd.graph.save_on_cpu():
            y = checkpoint(model, leaf, use_reentrant=reentrant)
        y.backward(inputs(4, WIDTH, seed=8).to(y.dtype))
        found.append(
            {"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
        )
    assert_close(*found, dtype=torch.bfloat16)
    assert row(ours).calls_fused == 2


def test_a_hidden_size_that_nothing_divides() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(37, HIDDEN + 1), nn.Linear(HIDDEN + 1, 3))
    peft = with_noise(get_peft_model(base, LoraConfig(r=5, target_modules=["0", "1"], use_dora=True)))
    ours = patched_copy(peft)
    assert_close(step(ours, inputs(6, 37)), step(peft, inputs(6, 37)))
    assert_fused(ours)
