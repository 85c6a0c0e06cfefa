"""Single PEFT layers of every kind the fused regions take, their float64 twins, and the Projection that
describes them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from accuracy import DEVICE, bitsandbytes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyfastlora.fused.projection import Projection
from pyfastlora.weights import FrozenWeight
from pyfastlora.weights.bnb_4bit import Bnb4bitWeight
from pyfastlora.weights.bnb_8bit import Bnb8bitWeight
from pyfastlora.weights.dense import DenseWeight


@dataclass(frozen=True)
class Features:
    """What a test asks of a layer. dropout, dora and rslora as in LoraConfig; scaling: alpha / rank."""

    rank: int = 4
    scaling: float = 2.0
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

#: A few of them, for formats of the base weight that differ in nothing else.
SOME_FEATURES = [FEATURES[i] for i in (0, 4, 5, 8, 9)]


def peft_layer(
    features: Features,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    *,
    kind: str = "dense",
    inner: int = 128,
    outer: int = 192,
    seed: int = 0,
) -> nn.Module:
    """A PEFT layer in training mode, its factors and magnitude away from their initial zeros and ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    linear = nn.Linear(inner, outer, bias=features.base_bias or kind == "conv1d").to(dtype)
    base = nn.Sequential({"dense": as_it_is, "conv1d": conv1d, "nf4": nf4, "int8": int8}[kind](linear))
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    config = LoraConfig(
        r=features.rank,
        lora_alpha=features.scaling * features.rank,
        lora_dropout=features.dropout,
        use_dora=features.dora,
        use_rslora=features.rslora,
        lora_bias=features.lora_bias,
        fan_in_fan_out=kind == "conv1d",
        target_modules=["0"],
    )
    layer = get_peft_model(base, config).base_model.model[0]
    if kind == "int8":
        layer.base_layer.init_8bit_state()  # as the first forward does
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


def as_it_is(linear: nn.Linear) -> nn.Module:
    return linear


def conv1d(linear: nn.Linear) -> nn.Module:
    """The linear as GPT-2's layer, which stores W transposed and always has a bias."""
    layer = Conv1D(linear.out_features, linear.in_features).to(linear.weight.dtype)
    layer.weight.data, layer.bias.data = linear.weight.data.t().contiguous(), linear.bias.data.clone()
    return layer


def int8(linear: nn.Linear) -> nn.Module:
    """The linear as bitsandbytes' LLM.int8, which keeps columns of x apart that pass the threshold."""
    bnb = bitsandbytes()
    sizes, bias = (linear.in_features, linear.out_features), linear.bias
    layer = bnb.nn.Linear8bitLt(*sizes, bias=bias is not None, has_fp16_weights=False, threshold=3.0)
    # quantised on its way from the CPU
    layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.data.clone(), requires_grad=False)
    return layer.to(DEVICE)


def nf4(linear: nn.Linear) -> nn.Module:
    """The linear as bitsandbytes' NF4 with double quantisation."""
    bnb, dtype = bitsandbytes(), linear.weight.dtype
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
    return layer.to(DEVICE)


def in_float64(layer: nn.Module) -> nn.Module:
    """The same PEFT layer in float64, on the dense values of the base weight."""
    base = layer.base_layer
    dense = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(layer))
        if base.bias is not None:
            dense.bias.copy_(base.bias)
    dense.weight.requires_grad_(False)
    if dense.bias is not None:
        dense.bias.requires_grad_(base.bias.requires_grad)
    from peft.tuners.lora import Linear

    twin = deepcopy(layer)
    twin.fan_in_fan_out = False
    for magnitude in twin.lora_magnitude_vector.values():
        magnitude.fan_in_fan_out = False
    if not isinstance(twin, Linear):  # a quantised layer: PEFT's dense layer with the same adapters
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
    base, weight = layer.base_layer, layer.base_layer.weight
    if weight.dtype == torch.int8:
        return base.state.CB.double() * base.state.SCB.double()[:, None] / 127
    if getattr(weight, "quant_state", None) is None:
        return weight.data.t() if layer.fan_in_fan_out else weight.data
    shape, dtype = tuple(weight.quant_state.shape), base.compute_dtype
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    return frozen(layer).dequantize(out)


def frozen(layer: nn.Module) -> FrozenWeight:
    base = layer.base_layer
    if base.weight.dtype == torch.int8:
        return Bnb8bitWeight.of(base.weight, base.state, base.training)
    if getattr(base.weight, "quant_state", None) is None:
        return DenseWeight(base.weight, layer.fan_in_fan_out)
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
