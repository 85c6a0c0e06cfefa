"""A decoder layer's seven linears at real widths, as `bench.gpu` times and weighs them (`python -m
bench._gpu_layers`).

    linears    q, k, v, o, gate, up and down, each by itself: what `bench.cost_model` counts
    block      the same with the activation between gate/up and down, so that whole regions can be fused
    compiled   linears, beside PEFT under torch.compile
    rivals     block, beside Axolotl's and Unsloth's kernels where they can be imported

The frozen dense base, PEFT and ours run in turn, in bfloat16 with adapters in float32 under autocast and in
bfloat16. All share the frozen weights. A case gives one row: milliseconds of the GPU alone and with the host,
the taxes of both, bytes that a step keeps for its backward pass and its peak, and how far ours is from PEFT.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import pyfastlora
from bench._cases import nf4
from bench._stopwatch import stopwatch
from bench._stream import Row, Sink, reason_of, serve
from bench._subjects import FEATURES, Feature, adapt, quantise
from bench._timing import interleave
from bench.cost_model import MODELS, Shape
from pyfastlora.fused.projection import Projection
from pyfastlora.fused.projections import fused_projections
from pyfastlora.weights.bnb_4bit import Bnb4bitWeight

RANK = 16
TINY = {"tiny": Shape(64, 128, 64, 32)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"fp32+ac": torch.float32, "bf16": torch.bfloat16}
RIVALS = {"Axolotl": "axolotl.kernels.lora", "Unsloth": "unsloth.kernels.fast_lora"}
GLU_LEVELS = ("block", "rivals")
SECONDS = 1.0  # of one case's rounds, and half of it again with the host


@dataclass(frozen=True, slots=True)
class Case:
    """What one row measures. storage: of the frozen weights; the base is dense for both."""

    level: str
    model: str
    storage: str  # bf16, NF4
    feature: str  # of FEATURES: LoRA, dropout, DoRA
    tokens: int

    def __str__(self) -> str:
        return f"{self.model} {self.level}, {self.storage} {self.feature}, T = {self.tokens}"


def cases() -> list[Case]:
    """All of them, those that matter most first: a run may end before the last."""
    kinds = [("bf16", "LoRA"), ("NF4", "LoRA"), ("bf16", "DoRA"), ("bf16", "dropout"), ("NF4", "DoRA")]
    kinds.append(("NF4", "dropout"))
    first, plain = (8192, 512), [("bf16", "LoRA"), ("NF4", "LoRA")]

    def of(level: str, models: Sequence[str], kinds: Sequence[Any], tokens: Sequence[int]) -> Iterator[Case]:
        for model, (storage, feature), t in itertools.product(models, kinds, tokens):
            yield Case(level, model, storage, feature, t)

    return [
        *of("linears", ["8B"], kinds, first),
        *of("block", ["8B"], plain, first),
        *of("compiled", ["8B"], plain[:1], first),
        *of("linears", ["8B"], kinds, (2048,)),
        *of("linears", ["70B", "1B"], kinds, (*first, 2048)),
        *of("block", ["8B", "70B", "1B"], plain, (2048,)),
        *of("rivals", ["8B"], plain, first),
    ]


def tiny_cases() -> list[Case]:
    """One of each kind."""
    kinds = [("linears", "bf16", "LoRA"), ("linears", "NF4", "DoRA"), ("block", "bf16", "dropout")]
    kinds += [("compiled", "bf16", "LoRA"), ("rivals", "bf16", "LoRA")]
    return [Case(level, "tiny", storage, feature, 24) for level, storage, feature in kinds]


# ---- the layer --------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, linear: Callable[[int, int], nn.Module], shape: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(shape.hidden, shape.intermediate)
        self.up_proj = linear(shape.hidden, shape.intermediate)
        self.down_proj = linear(shape.intermediate, shape.hidden)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """The linears of a decoder layer; what lies between them is input."""

    def __init__(self, linear: Callable[[int, int], nn.Module], shape: Shape) -> None:
        super().__init__()
        self.q_proj = linear(shape.hidden, shape.q)
        self.k_proj = linear(shape.hidden, shape.kv)
        self.v_proj = linear(shape.hidden, shape.kv)
        self.o_proj = linear(shape.q, shape.hidden)
        self.mlp = Mlp(linear, shape)

    def forward(
        self, x: Tensor, attended: Tensor, normed: Tensor, h: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """q, k, v of x, o of attended, and the whole MLP of normed; with `h` its three linears one by one."""
        attention = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended)
        if h is None:
            return *attention, self.mlp(normed)
        return *attention, self.mlp.gate_proj(normed), self.mlp.up_proj(normed), self.mlp.down_proj(h)


class Foreign(nn.Module):
    """A layer of PEFT's through another project's functions."""

    def __init__(self, functions: Any, layer: nn.Module) -> None:
        super().__init__()
        self.functions, self.layer = functions, layer

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.functions.apply_lora_qkv(self.layer, x)
        o = self.functions.apply_lora_o(self.layer, attended)
        return q, k, v, o, self.functions.apply_lora_mlp_swiglu(self.layer.mlp, normed)


class Packed(nn.Module):
    """An adapted NF4 linear of random codes without PEFT and bitsandbytes, where the latter is missing."""

    def __init__(self, feature: Feature, dtype: torch.dtype, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = Bnb4bitWeight(nf4((outer, inner), torch.bfloat16), torch.bfloat16)
        device = self.weight.packed.packed.device
        a, b = (torch.randn(*size, device=device) * 0.02 for size in ((RANK, inner), (outer, RANK)))
        norm = self.weight.norm(a, b, 2.0)
        self.a, self.b = nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))
        scaled = norm * torch.empty_like(norm).uniform_(0.9, 1.1)
        self.magnitude = nn.Parameter(scaled.to(dtype)) if feature.dora else None
        self.dropout = feature.dropout

    def forward(self, x: Tensor) -> Tensor:
        p = Projection(self.weight, None, self.a, self.b, None, 2.0, self.dropout, self.magnitude)
        return fused_projections(x, [p])[0]


@functools.lru_cache(maxsize=1)
def frozen(shape: Shape, device: torch.device) -> Layer:
    """The base: dense bfloat16 weights as nn.Linear draws them."""

    def linear(inner: int, outer: int) -> nn.Module:
        return nn.Linear(inner, outer, bias=False, dtype=torch.bfloat16, device=device)

    torch.manual_seed(0)
    return Layer(linear, shape).requires_grad_(False)


@functools.lru_cache(maxsize=1)
def adapted(shape: Shape, device: torch.device, storage: str, feature: Feature) -> dict[str, nn.Module]:
    """ "PEFT fp32+ac", "ours fp32+ac" and the same in bf16; ours alone where bitsandbytes is needed and
    missing.
    """
    if storage == "NF4" and importlib.util.find_spec("bitsandbytes") is None:
        return {
            f"ours {name}": Layer(functools.partial(Packed, feature, dtype), shape)
            for name, dtype in ADAPTERS.items()
        }
    model = _twin(frozen(shape, device))
    if storage == "NF4":
        quantise(model, torch.bfloat16)
    made = {}
    for name, dtype in ADAPTERS.items():
        torch.manual_seed(1)
        made[f"PEFT {name}"] = adapt(_twin(model), TARGETS, feature, dtype, RANK)
        made[f"ours {name}"] = _twin(made[f"PEFT {name}"])
        pyfastlora.patch(made[f"ours {name}"])
    return made


def _twin(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters."""
    return deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


# ---- a step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """What every variant gets: x, attended, normed and, where the linears stand alone, h, each [1, T, ..];
    and the gradients of the outputs.
    """

    inputs: list[Tensor]
    grads: list[Tensor]

    @staticmethod
    def of(case: Case, shape: Shape, device: torch.device) -> Given:
        widths = [shape.hidden, shape.q, shape.hidden]
        if case.level not in GLU_LEVELS:
            widths.append(shape.intermediate)
        torch.manual_seed(2)
        inputs = [torch.randn(1, case.tokens, n, dtype=torch.bfloat16, device=device) for n in widths]
        with torch.no_grad():
            grads = [torch.randn_like(y) for y in frozen(shape, device)(*inputs)]
        return Given([x.requires_grad_() for x in inputs], grads)


class Step:
    """Forward and backward of one variant: call it; what it leaves in .grad is dropped."""

    def __init__(self, model: nn.Module, given: Given, autocast: bool, compiled: bool = False) -> None:
        self.model, self._autocast = model, autocast
        self._inputs, self._grads = given.inputs, given.grads
        self._leaves = [*given.inputs, *(p for p in model.parameters() if p.requires_grad)]
        layer = getattr(model, "base_model", model)
        self._run = layer = getattr(layer, "model", layer)
        if compiled:  # on a CPU, where this is rehearsed, inductor would spend most of the time on its C++
            backend = "inductor" if given.inputs[0].is_cuda else "aot_eager"
            self._run = torch.compile(layer, backend=backend)

    def forward(self) -> tuple[Tensor, ...]:
        device = self._inputs[0].device.type
        context = torch.autocast(device, torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with context:
            outputs: tuple[Tensor, ...] = self._run(*self._inputs)
        return outputs

    def __call__(self) -> None:
        torch.autograd.backward(self.forward(), self._grads)
        self.drop()

    def drop(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def results(self) -> list[Tensor]:
        """The outputs and the inputs' gradients under one seed."""
        torch.manual_seed(7)
        outputs = self.forward()
        torch.autograd.backward(outputs, self._grads)
        found = [y.detach() for y in outputs] + [x.grad for x in self._inputs if x.grad is not None]
        self.drop()
        return found

    def saved_bytes(self) -> int:
        """Of the tensors that a forward keeps for its backward, parameters and frozen weights apart."""
        known = {t.untyped_storage().data_ptr() for t in _weights(self.model)}
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = self.forward()
        total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)
        del outputs
        return total

    def peak_bytes(self) -> int | None:
        """Most memory that a step holds beyond what is there before it. None on a CPU."""
        if not self._inputs[0].is_cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - before


def _weights(model: nn.Module) -> Iterator[Tensor]:
    for p in model.parameters():
        yield p
        state = getattr(p, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (t for t in vars(part).values() if isinstance(t, Tensor)) if part else ()
    for module in model.modules():
        if isinstance(module, Packed):
            yield from module.weight.tensors


# ---- a row ------------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device) -> list[Row]:
    """The case's row."""
    shape = (MODELS | TINY)[case.model]
    given = Given.of(case, shape, device)
    models = adapted(shape, device, case.storage, FEATURES[case.feature])
    steps, left_out = {"base": Step(frozen(shape, device), given, False)}, {}
    for name, make in _variants(case, models, given):
        try:
            step = make()
            step()
            steps[name] = step
        except Exception as error:
            left_out[name] = reason_of(error)
    if "PEFT bf16" not in models:
        left_out["PEFT"] = "bitsandbytes is not installed"
    watch = stopwatch(device)
    seconds = SECONDS if device.type == "cuda" else 0.1
    busy = interleave(steps, rounds=30, at_least=3, seconds=seconds, warmup=3, timed=watch.busy)
    wall = interleave(steps, rounds=10, at_least=2, seconds=seconds / 2, timed=watch.wall)
    plain = {name: step for name, step in steps.items() if "compiled" not in name}
    return [
        {
            **asdict(case),
            "rank": RANK,
            "ms": {name: busy.time(name).to_dict(1e3) for name in steps},
            "wall_ms": {name: wall.time(name).to_dict(1e3) for name in steps},
            "tax": {name: busy.ratio(name, "base").to_dict() for name in steps if name != "base"},
            "wall_tax": {name: wall.ratio(name, "base").to_dict() for name in steps if name != "base"},
            "rounds": len(busy),
            "saved_bytes": {name: step.saved_bytes() for name, step in plain.items()},
            "peak_bytes": {name: step.peak_bytes() for name, step in steps.items()},
            "difference": _differences(steps),
            "fallback": _fallback(models),
            "left_out": left_out,
        }
    ]


def _variants(
    case: Case, models: dict[str, nn.Module], given: Given
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """(name, how to make it): ours and PEFT's; where others join in, without those with bfloat16 adapters."""
    others = case.level in ("compiled", "rivals")
    for name, model in models.items():
        if not (others and name.endswith("bf16")):
            yield name, functools.partial(Step, model, given, name.endswith("ac"))
    peft = models.get("PEFT fp32+ac")
    if peft is not None and case.level == "compiled":
        torch._dynamo.reset()
        yield "PEFT compiled", lambda: Step(_twin(peft), given, True, compiled=True)
        ours = models["ours fp32+ac"]  # itself: a copy's siblings would have to be found again
        yield "ours compiled", lambda: Step(ours, given, True, compiled=True)
    if peft is not None and case.level == "rivals":
        for name, module in RIVALS.items():
            yield name, functools.partial(_foreign, module, peft, given)


def _foreign(module: str, peft: nn.Module, given: Given) -> Step:
    return Step(Foreign(importlib.import_module(module), _twin(peft).base_model.model), given, True)


def _differences(steps: dict[str, Step]) -> dict[str, float]:
    """||ours - PEFT|| / ||PEFT||, the largest over the outputs and the inputs' gradients."""
    found = {}
    for adapter in ADAPTERS:
        peft, ours = steps.get(f"PEFT {adapter}"), steps.get(f"ours {adapter}")
        if peft and ours:
            pairs = zip(ours.results(), peft.results(), strict=True)
            worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
            found[adapter] = float(f"{worst:.2g}") if math.isfinite(worst) else math.inf
    return found


def _fallback(models: dict[str, nn.Module]) -> str:
    """Why some calls of ours ran PEFT's forward; "" where all were fused."""
    ours = [model for name, model in models.items() if name.startswith("ours")]
    rows = [row for model in ours for row in pyfastlora.report(model)]
    return "; ".join(sorted({row.reason for row in rows if not row.fused or row.calls_fallback}))


@click.command()
@click.option("--stream", type=click.Path(path_type=Path), required=True, help="Lines of bench._stream.")
@click.option("--until", type=float, default=math.inf)
@click.option("--skip", type=int, default=0)
@click.option("--tiny", is_flag=True, help="On the CPU, sizes for a test of this program.")
def main(stream: Path, until: float, skip: int, tiny: bool) -> None:
    """A step of `python -m bench.gpu`."""
    device = torch.device("cpu" if tiny else "cuda")
    wanted = tiny_cases() if tiny else cases()
    serve(wanted, lambda case: measure(case, device), Sink(stream, until), skip)


if __name__ == "__main__":
    main()
