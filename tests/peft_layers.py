"""Single PEFT layers of every kind the fused regions take, their float64 twins, and the Projection that
describes them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyfastlora.fused.projections import Projection
from pyfastlora.weights.bnb_4bit import Bnb4bitWeight
from pyfastlora.weights.dense import DenseWeight


@dataclass(frozen=True)
class Features:
    """What a test asks of a layer. dropout, dora and rslora as in LoraConfig."""

    rank: int = 4
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    lora_bias: bool = False
    base_bias: bool = False
    train_base_bias: bool = False

    def __str__(self) -> str:
        names = ("dora", "rslora", "lora_bias", "base_bias", "train_base_bias")
        on = [name for name in names if getattr(self, name)] + (["dropout"] if self.dropout else [])
        return "+".join(on) or "lora"


FEATURES = [
    Features(),
    Features(rslora=True, rank=16),
    Features(dropout=0.2),
    Features(base_bias=True),
    Features(base_bias=True, train_base_bias=True, dropout=0.1),
    Features(lora_bias=True, base_bias=True, train_base_bias=True),
    Features(lora_bias=True, dropout=0.3),
    Features(dora=True),
    Features(dora=True, base_bias=True, train_base_bias=True, rank=17),
    Features(dora=True, dropout=0.2),
    Features(dora=True, dropout=0.1, base_bias=True, train_base_bias=True),
]


def peft_layer(
    features: Features,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    *,
    four_bit: bool = False,
    inner: int = 128,
    outer: int = 192,
    seed: int = 0,
) -> nn.Module:
    """A PEFT layer in training mode, its factors and magnitude away from their initial zeros and ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(inner, outer, bias=features.base_bias).to(dtype))
    if four_bit:
        base[0] = quantised(base[0], dtype)
        base.is_loaded_in_4bit = True
    config = LoraConfig(
        r=features.rank,
        lora_alpha=2 * features.rank,
        lora_dropout=features.dropout,
        use_dora=features.dora,
        use_rslora=features.rslora,
        lora_bias=features.lora_bias,
        target_modules=["0"],
    )
    layer = get_peft_model(base, config).base_model.model[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.05))
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
    if features.train_base_bias:
        layer.base_layer.bias.requires_grad_(True)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return layer.train()


def quantised(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The linear as bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # its evaluation kernel repacks the weight in place
    return layer.to("cpu")


def in_float64(layer: nn.Module) -> nn.Module:
    """The same PEFT layer in float64, on the dense values of the base weight."""
    base = layer.base_layer
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(layer))
        if base.bias is not None:
            dense.bias.copy_(base.bias)
    dense.weight.requires_grad_(False)
    if dense.bias is not None:
        dense.bias.requires_grad_(base.bias.requires_grad)
    from peft.tuners.lora import Linear

    twin = deepcopy(layer)
    if not isinstance(twin, Linear):  # a 4-bit layer: PEFT's dense layer with the same adapters
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=twin.r["default"],
            lora_alpha=twin.lora_alpha["default"],
            lora_dropout=getattr(twin.lora_dropout["default"], "p", 0.0),
            use_dora=twin.use_dora["default"],
            lora_bias=twin.lora_bias["default"],
            target_modules=["0"],
        )
        made = get_peft_model(nn.Sequential(deepcopy(dense)), config).base_model.model[0]
        made.load_state_dict({k: v for k, v in twin.state_dict().items() if "lora_" in k}, strict=False)
        made.scaling["default"] = twin.scaling["default"]
        twin = made.train(layer.training)
    twin.base_layer = dense
    twin = twin.double()
    for (_, p), (_, q) in zip(trainables(twin), trainables(layer), strict=True):
        p.data = q.data.double()
    return twin


def dense_weight(layer: nn.Module) -> Tensor:
    weight = layer.base_layer.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.data
    out = torch.empty(tuple(weight.quant_state.shape), dtype=layer.base_layer.compute_dtype)
    return frozen(layer).dequantize(out)


def frozen(layer: nn.Module) -> DenseWeight | Bnb4bitWeight:
    base = layer.base_layer
    if getattr(base.weight, "quant_state", None) is None:
        return DenseWeight(base.weight)
    return Bnb4bitWeight.of(base.weight, base.weight.quant_state, base.compute_dtype)


def projection_of(layer: nn.Module) -> Projection:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    magnitude = layer.lora_magnitude_vector["default"].weight if layer.use_dora["default"] else None
    return Projection(
        frozen(layer),
        layer.base_layer.bias,
        a.weight,
        b.weight,
        b.bias,
        layer.scaling["default"],
        getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0,
        magnitude,
    )


def trainables(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
