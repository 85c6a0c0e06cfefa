"""Small models for the tests of patching, and the two runs that they compare."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accuracy import DEVICE, bitsandbytes, noise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pyfastlora
from pyfastlora.patching import Row

WIDTH, HIDDEN = 64, 128


class Toy(nn.Module):
    """Two linears with something between them; the first has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def with_noise(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Put noise on every adapter parameter: B = 0 would hide half of the formula."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                size = parameter.abs().mean() if "magnitude" in name else 1
                parameter += noise(*parameter.shape, dtype=parameter.dtype, seed=seed) * scale * size
    return model


def lora(base: nn.Module | None = None, adapter: str = "default", **config: Any) -> PeftModel:
    """A PEFT model over Toy (or base) with noise in its adapter."""
    torch.manual_seed(0)
    base = Toy() if base is None else base
    settings = {"r": 8, "lora_alpha": 12, "target_modules": ["up", "down"], **config}
    return with_noise(get_peft_model(base, LoraConfig(**settings), adapter_name=adapter))


def toy_4bit(
    quant_type: str = "nf4",
    *,
    nested: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
) -> nn.Module:
    """Toy with bitsandbytes' 4-bit linears, quantised on the device."""
    bnb = bitsandbytes()
    torch.manual_seed(0)
    model = Toy()
    sizes = {"up": (width, HIDDEN, bias), "down": (HIDDEN, width, False)}
    for name, (inputs, outputs, biased) in sizes.items():
        layer = bnb.nn.Linear4bit(
            inputs, outputs, biased, compute_dtype=dtype, quant_type=quant_type, compress_statistics=nested
        )
        layer.weight = bnb.nn.Params4bit(
            torch.randn(outputs, inputs) / inputs**0.5,
            requires_grad=False,
            quant_type=quant_type,
            compress_statistics=nested,
            module=layer,
        )
        setattr(model, name, layer.to(DEVICE))
    model.is_loaded_in_4bit = True  # what PEFT dispatches on
    return model


def toy_8bit(*, bias: bool = True, threshold: float = 6.0) -> nn.Module:
    """Toy with bitsandbytes' LLM.int8 linears, quantised on the device."""
    bnb = bitsandbytes()
    torch.manual_seed(0)
    model = Toy()
    sizes = {"up": (WIDTH, HIDDEN, bias), "down": (HIDDEN, WIDTH, False)}
    for name, (inputs, outputs, biased) in sizes.items():
        with torch.device("cpu"):  # it is quantised on its way from there
            layer = bnb.nn.Linear8bitLt(inputs, outputs, biased, has_fp16_weights=False, threshold=threshold)
        setattr(model, name, layer.to(DEVICE))
    model.is_loaded_in_8bit = True  # what PEFT dispatches on
    return model


def toy_conv1d() -> nn.Module:
    """Toy with GPT-2's layers, whose weights are stored transposed."""
    torch.manual_seed(0)
    model = Toy()
    model.up, model.down = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)
    nn.init.normal_(model.up.bias)
    return model.to(DEVICE)


def patched_copy(model: nn.Module, **options: Any) -> nn.Module:
    """A deepcopy of the model, patched."""
    ours = copy.deepcopy(model)
    pyfastlora.patch(ours, **options)
    return ours


def first(model: nn.Module) -> Any:
    """The layer most tests look at, of a model of `lora()`."""
    return model.base_model.model.up


def row(model: nn.Module) -> Row:
    """Its row in the report."""
    return pyfastlora.report(model)["up"]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed)


def step(model: nn.Module, x: Tensor, *args: Any, seed: int = 5, **kwargs: Any) -> dict[str, Tensor]:
    """One seeded forward and backward: the output, the gradient of x and of every parameter that got one."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = model(x, *args, **kwargs)
    torch.manual_seed(seed + 1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    # a gradient that got lost is a zero here, so that comparing it shows an error of 1
    found = {"output": y.detach(), "x": torch.zeros_like(x) if x.grad is None else x.grad}
    # .grad of the parameters, by names that do not depend on who wraps the model
    found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def assert_equal(ours: dict[str, Tensor], peft: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == peft.keys()
    for name in peft:
        assert ours[name].dtype is peft[name].dtype, name
        assert torch.equal(ours[name], peft[name]), (name, difference(ours[name], peft[name]))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


#: Two roundings of one formula, over the few hundred terms of these models.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def assert_close(
    ours: dict[str, Tensor], peft: dict[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Within a few units of the last place of dtype, relative to the norm of each tensor."""
    assert ours.keys() == peft.keys()
    for name in peft:
        assert ours[name].dtype is peft[name].dtype, name
        assert difference(ours[name], peft[name]) <= CLOSE[dtype], name
