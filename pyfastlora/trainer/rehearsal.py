"""A training step without values: every operation of it runs on tensors that have shapes and no memory.

The model is built from its config.json, adapted and patched as for a real run, and its parameters become
fake ones of torch. Autograd, checkpointing, PEFT and our kernels then take the ways of a real step, and a
`Counter` sees which tensors are alive together. Nothing is known per architecture.

Fake tensors pretend to be on the CPU, whatever the run's device: the GPU's kernels save tensors of the same
sizes. Two things are left out and counted by formula: quantised weights are dense ones here, and flash
attention is torch's own, which saves as much.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfastlora.trainer.config import Config
from pyfastlora.trainer.errors import UserError
from pyfastlora.trainer.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRADIENTS, ACTIVATIONS, LOGITS = "gradients", "activations", "logits and loss"
_HELD = "held"  # parameters, which are counted as they are held in truth


@dataclass(frozen=True)
class Batch:
    """rows samples of `tokens` each. packed: rows of several; masked: padding differs from row to row."""

    rows: int
    tokens: int
    packed: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive at once beside the parameters, and of which kind."""

    total: int
    kinds: dict[str, int]


class Rehearsal:
    """The model of a configuration without values; `train` and `evaluate` count what a pass needs."""

    def __init__(self, config: Config, precision: Precision, tokenizer: PreTrainedTokenizerBase) -> None:
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        import pyfastlora
        from pyfastlora.patching.conditions import memory_counted
        from pyfastlora.trainer import model as models
        from pyfastlora.trainer.adapter import add_adapter

        self._config, self.precision = config, precision
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)  # states of generators are real
        self._rehearsed = lambda: memory_counted(FakeTensor)
        base = base_on_meta(config, precision)
        quantised = _quantised(base) if config.bits else set()
        with torch.device("meta"):
            self.model: Any = add_adapter(base, config, precision, tokenizer)
        self.vocabulary = models.vocabulary_of(self.model)
        #: Weights that are held in config.bits.
        self.quantised = [p for p in self.model.parameters() if id(p) in quantised]
        self._become_fake()
        if config.adapter and config.fastlora:
            with self._rehearsed():
                pyfastlora.patch(self.model)

    @property
    def frozen(self) -> list[Tensor]:
        """Dense weights that are not trained, and buffers."""
        quantised = set(map(id, self.quantised))
        frozen = [p for p in self.model.parameters() if not p.requires_grad and id(p) not in quantised]
        return [*frozen, *self.model.buffers()]

    @property
    def trained(self) -> list[Tensor]:
        """Parameters that the optimizer has."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def largest_block(self) -> list[Tensor]:
        """The parameters of the largest decoder layer, which sharding engines gather at a time."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        layers = [layer for many in lists for layer in many]
        return max((list(layer.parameters()) for layer in layers), key=bytes_of, default=[])

    def train(self, batch: Batch, accumulates: bool, checkpointing: bool) -> Peak:
        """Forward and backward. accumulates: with the gradients of a batch before. Raises UserError."""
        model = self.model
        model.train()
        if checkpointing:
            # the state of a generator would be a tensor with values
            kwargs = self._checkpointing()
            every = kwargs.pop("every_n_layers")
            model.gradient_checkpointing_enable({**kwargs, "preserve_rng_state": False}, every_n_layers=every)
        try:
            return self._count(lambda: self._loss(batch).backward(), accumulates)
        finally:
            if checkpointing:
                model.gradient_checkpointing_disable()

    def evaluate(self, batch: Batch) -> Peak:
        """A forward without gradients. Raises UserError."""
        self.model.eval()

        def forward() -> None:
            with torch.no_grad():
                self._loss(batch)

        return self._count(forward, False)

    def _checkpointing(self) -> dict[str, Any]:
        return self._config.gradient_checkpointing_kwargs.model_dump()

    def _loss(self, batch: Batch) -> Tensor:
        """As transformers' Trainer computes it: under autocast with outputs in float32, and then let go."""
        ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        if batch.packed:
            inputs["position_ids"] = torch.zeros_like(ids)
        elif batch.masked:
            inputs["attention_mask"] = torch.ones_like(ids)
        if self.model.training:
            inputs["num_items_in_batch"] = torch.zeros((), dtype=torch.int64)
        cast = self.precision.autocast
        with torch.autocast("cpu", cast) if cast else contextlib.nullcontext():
            outputs = self.model(**inputs)
        if cast:
            from accelerate.utils import convert_to_fp32

            outputs = convert_to_fp32(outputs)
        loss: Tensor = outputs["loss"]
        return loss

    def _count(self, work: Callable[[], None], accumulates: bool) -> Peak:
        from pyfastlora.trainer.model import first_line

        log = logging.getLogger("torch._subclasses.fake_tensor")  # prints what is raised, too
        level = log.level
        # Scratch memory that the kernels keep for a thread goes with its thread.
        with ThreadPoolExecutor(1) as thread:
            try:
                log.setLevel(logging.CRITICAL)
                return thread.submit(self._count_here, work, accumulates).result()
            except Exception as error:  # of a model's own code
                raise UserError(
                    f"base_model: {self._config.base_model} does not run without values, so its memory "
                    f"cannot be planned: {first_line(error)}"
                ) from error
            finally:
                log.setLevel(level)

    def _count_here(self, work: Callable[[], None], accumulates: bool) -> Peak:
        from pyfastlora.trainer.memory import Counter

        counter, trained = Counter(self._kind), self.trained
        counter.add([*self.frozen, *self.quantised, *trained], _HELD)
        held = counter.bytes

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                counter.call_it(parameter.grad, GRADIENTS)

        handles = [p.register_post_accumulate_grad_hook(arrived) for p in trained]
        try:
            with self._mode, counter, self._rehearsed():
                if accumulates:
                    for p in trained:
                        p.grad = torch.empty_like(p)
                        counter.call_it(p.grad, GRADIENTS)
                work()
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None
        return Peak(counter.peak - held, {k: n for k, n in counter.at_peak.items() if k != _HELD and n})

    def _kind(self, tensor: Tensor) -> str:
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
        return LOGITS if wide else ACTIVATIONS

    def _become_fake(self) -> None:
        made: dict[int, nn.Parameter] = {}
        with self._mode:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None and id(p) not in made:
                        empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                        made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                    if p is not None:
                        module._parameters[name] = made[id(p)]
                for name, b in module._buffers.items():
                    if b is not None:
                        module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
        self.quantised = [made[id(p)] for p in self.quantised]


def base_on_meta(config: Config, precision: Precision) -> Any:
    """The base model on the meta device. Raises UserError where its files do not say what it is."""
    from transformers import AutoModelForCausalLM

    from pyfastlora.trainer.model import check_base_model, first_line
    from pyfastlora.trainer.model_config import load_model_config

    check_base_model(config, weights=False)
    wanted = config.attn_implementation or ""
    attention = "sdpa" if wanted.startswith(("flash", "flex")) else wanted
    try:
        found = load_model_config(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                found,
                dtype=precision.base,
                trust_remote_code=config.trust_remote_code,
                **({"attn_implementation": attention} if attention else {}),
            )
    except UserError:
        raise
    except Exception as error:  # of the hub's client, and of a model's own code
        raise UserError(
            f"base_model: no model can be made of {config.base_model}: {first_line(error)}"
        ) from error
    model.config.use_cache = False
    return model


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the values of tensors, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def packed_bytes(shape: torch.Size, bits: int, blocksize: int = 64, nested: bool = True) -> int:
    """A weight as bitsandbytes holds it, with its scales: in 4 bits by blocks, or in 8 by rows."""
    n = math.prod(shape)
    if bits == 8:
        return n + 4 * shape[0]
    blocks = -(-n // blocksize)
    scales = blocks + 4 * -(-blocks // 256) + 4 * 256 + 4 if nested else 4 * blocks
    return -(-n // 2) + scales + 4 * 16


def _quantised(model: Any) -> set[int]:
    """The weights of linears, without the head and what is tied to it: transformers quantises these."""
    from transformers.quantizers.base import get_keys_to_not_convert

    left = get_keys_to_not_convert(model)
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == key or name.endswith(f".{key}") for key in left)
    }
