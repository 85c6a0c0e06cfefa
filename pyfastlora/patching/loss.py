"""A language model's loss without whole logits: the class such a model gets, and what its head gives.

A causal model of transformers is body -> head -> scaling or capping of the logits -> `loss_function`. In a
call with labels its head stands aside: what goes on in its place are `Logits`, which know of which hidden
states, and take down what is done to them. If that is a factor and a soft cap, and then comes the loss of
causal models, fused/cross_entropy.py computes it. Whatever else is asked of them makes them what they stand
for, and the call goes its usual way. So no architecture is known here, and generation is as it was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from pyfastlora.fused.cross_entropy import LossOptions, linear_cross_entropy
from pyfastlora.fused.projection import Projection, output_dtype
from pyfastlora.patching.layers import STATE
from pyfastlora.patching.mlp import projection_of
from pyfastlora.weights.dense import DTYPES, DenseWeight


@dataclass(slots=True)
class LossState:
    """What is remembered of one model, for its calls and for the report."""

    head: str = ""  # the name of its child; "": its class is its own, and last_reason says why
    calls_fused: int = 0
    calls_fallback: int = 0
    last_reason: str = ""

    @property
    def calls(self) -> int:
        return self.calls_fused + self.calls_fallback


def attach_loss(module: nn.Module) -> None:
    """Let a model of transformers with a head compute its loss in chunks, or note why not."""
    if not isinstance(module, PreTrainedModel) or STATE in module.__dict__:
        return
    head = module.get_output_embeddings()
    if head is None:
        return
    name = next((n for n, child in module.named_children() if child is head), None)
    if name is None:
        module.__dict__[STATE] = LossState(last_reason="its head is no child of its own")
    elif module.loss_function is not ForCausalLMLoss:
        module.__dict__[STATE] = LossState(last_reason=_another(module.loss_function))
    else:
        module.__dict__[STATE] = LossState(name)
        module.__class__ = _class_of(type(module))  # type: ignore[assignment]


def loss_line(module: nn.Module) -> str:
    """What the report says of a module's loss; nothing where there is none."""
    state = module.__dict__.get(STATE)
    if not isinstance(state, LossState):
        return ""
    if not state.head:
        return f"loss of {type(module).__name__}: whole logits: {state.last_reason}"
    line = f"loss of {type(module).__name__}: in chunks, {state.calls_fused} calls"
    if state.calls_fallback:
        line += f"; whole logits, {state.calls_fallback} calls: {state.last_reason}"
    return line


class FusedLoss(nn.Module):
    """Computes its loss from the head's input where nothing but the loss asks for the logits."""

    #: The class that `unpatch` gives back.
    original: ClassVar[type[PreTrainedModel]]

    @property
    def loss_function(self) -> Any:
        stock = self.original.loss_function.fget(self)  # type: ignore[attr-defined]
        return functools.partial(_loss, stock, self.__dict__[STATE])

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.original.loss_function.fset(self, value)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)  # of object: how to make one, of what, its state
        return _blank, (type(self).original,), *made[2:]


def _class_of(original: type[PreTrainedModel]) -> type[FusedLoss]:
    if original not in _classes:

        @functools.wraps(original.forward)  # Trainer reads the names of its arguments
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # a replica's outputs are gathered by DataParallel, which knows tensors only
            replica = "_is_replica" in self.__dict__
            if kwargs.get("labels") is None or replica or torch.compiler.is_compiling():
                return original.forward(self, *args, **kwargs)
            state: LossState = self.__dict__[STATE]
            head, calls = self.__dict__["_modules"][state.head], state.calls
            self.__dict__["_modules"][state.head] = _StandIn(head, state)
            try:
                output = original.forward(self, *args, **kwargs)
            finally:
                self.__dict__["_modules"][state.head] = head
            if state.calls == calls:
                _count(state, "its forward computes the loss by itself")
            return output

        # the name goes into config.json
        members = {"original": original, "forward": forward, "__module__": __name__}
        _classes[original] = type(original.__name__, (FusedLoss, original), members)
    return _classes[original]


_classes: dict[type[PreTrainedModel], type[FusedLoss]] = {}


def _blank(original: type[PreTrainedModel]) -> Any:
    made = _class_of(original)
    return made.__new__(made)


class _StandIn:
    """In the head's place for the time of a call."""

    def __init__(self, head: nn.Module, state: LossState) -> None:
        self.head, self.state = head, state

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(hidden, Tensor):
            return self.head(hidden, *args, **kwargs)
        found = _head(self.head, hidden)
        if isinstance(found, str):
            _count(self.state, found)
            return self.head(hidden)
        return Logits(self.head, hidden, found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


_PLAIN = LossOptions()


@dataclass(frozen=True)
class Logits:
    """cap(scale head(hidden)), not computed; the tensor itself as soon as anything else is asked of it."""

    head: nn.Module
    hidden: Tensor
    projection: Projection
    options: LossOptions = _PLAIN
    bounded: bool = False  # by tanh, whose factor is the cap
    cast: torch.dtype | None = None

    @functools.cached_property
    def whole(self) -> Tensor:
        """The logits."""
        logits = self.head(self.hidden)
        if self.options.scale != 1:
            logits = logits * self.options.scale
        cap = self.options.softcap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        elif self.bounded:
            logits = torch.tanh(logits)
        return logits if self.cast is None else logits.to(self.cast)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; accelerate asks for it after every forward under autocast."""
        return self.cast or output_dtype(self.hidden, self.projection)

    def float(self) -> Logits:
        """In float32, in which the loss is computed anyway."""
        return replace(self, cast=torch.float32)

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, int | float) or self.options.softcap is not None:
            return self.whole * factor
        if self.bounded:
            scale = self.options.scale * factor  # of what was divided by the cap before
            return replace(self, options=replace(self.options, softcap=float(factor), scale=scale))
        return replace(self, options=replace(self.options, scale=self.options.scale * factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if not isinstance(divisor, int | float) or self.bounded:
            return self.whole / divisor
        return self * (1 / divisor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if func is torch.tanh and isinstance(first, Logits) and not first.bounded and not kwargs:
            return replace(first, bounded=True)
        plain = [each.whole if isinstance(each, Logits) else each for each in args]
        named = {n: v.whole if isinstance(v, Logits) else v for n, v in (kwargs or {}).items()}
        return func(*plain, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole[index]


def _loss(stock: Any, state: LossState, /, logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
    """The loss of `logits`, whatever they are: ForCausalLMLoss of Logits in chunks, all else by `stock`."""
    if not isinstance(logits, Logits):
        return stock(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
    reason = None
    if stock is not ForCausalLMLoss:
        reason = _another(stock)
    elif logits.bounded and logits.options.softcap is None:
        reason = "its logits are bounded by tanh without a factor"
    elif vocab_size != logits.projection.weight.shape[0]:
        reason = f"its head gives {logits.projection.weight.shape[0]} logits, and vocab_size is {vocab_size}"
    if reason is not None:
        _count(state, reason)
        return stock(logits=logits.whole, labels=labels, vocab_size=vocab_size, **kwargs)
    _count(state)
    ignored = kwargs.get("ignore_index", -100)
    targets, divisor = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    hidden = logits.hidden.flatten(0, -2)
    targets = targets.reshape(-1).to(hidden.device)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(hidden.device)
    options = replace(logits.options, ignore_index=ignored)
    return linear_cross_entropy(hidden, targets, logits.projection, options, divisor)


def _head(head: nn.Module, x: Tensor) -> Projection | str:
    """What a head stands for, or why its logits have to be made."""
    if type(head) is ModulesToSaveWrapper:
        if head.disable_adapters or len(head.active_adapters) != 1 or _is_watched(head):
            return "its head is trained whole, and not the one adapter's copy alone is used"
        head = head.modules_to_save[head.active_adapters[0]]
    trained = type(head) is nn.Linear and head.weight.requires_grad
    found = _trained(head, x) if isinstance(head, nn.Linear) and trained else projection_of(head, x)
    if isinstance(found, Projection) and found.dropout > 0:
        return "dropout on the head draws its mask over all tokens at once"
    return found if isinstance(found, Projection) else f"its head: {found}"


def _trained(head: nn.Linear, x: Tensor) -> Projection | str:
    weight = head.weight
    if _is_watched(head):
        return "a hook sits on it"
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
        return "its weight is divided among processes"
    if weight.dtype not in DTYPES or weight.device != x.device:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    return Projection(DenseWeight(weight), head.bias)


def _is_watched(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(module.__dict__[name] for name in hooks)


def _another(function: Any) -> str:
    return f"its loss is {getattr(function, '__name__', 'another function')}, not ForCausalLMLoss"


def _count(state: LossState, reason: str = "") -> None:
    if reason:
        state.calls_fallback, state.last_reason = state.calls_fallback + 1, reason
    else:
        state.calls_fused += 1
