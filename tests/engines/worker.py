"""One of the processes of an engine: trains every case patched, and writes what it saw as it goes.

python -m torch.distributed.run --nproc_per_node 2 worker.py ENGINE/ENGINE/... DIRECTORY SECONDS
"""

from __future__ import annotations

import faulthandler
import functools
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import pyfastlora
from engines.cases import CASES, LEARNING_RATE, Engine, make, torch_engine, train

Gradients = Iterator[tuple[str, Tensor | None]]


def ddp(model: nn.Module) -> Engine:
    return torch_engine(model, DistributedDataParallel(model))


def fsdp2(model: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None) -> Engine:
    """`fully_shard` on every module of these kinds, on every decoder layer and on the whole."""
    for module in list(model.modules()):
        if kinds and type(module) in kinds:
            fully_shard(module)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    def gradients() -> Gradients:
        for name, p in model.named_parameters():
            if p.requires_grad:
                yield name, None if p.grad is None else p.grad.full_tensor()

    return torch_engine(model, model, gradients)


def fsdp2_linear(model: nn.Module) -> Engine:
    return fsdp2(model, (nn.Linear,))


def fsdp2_lora_layer(model: nn.Module) -> Engine:
    return fsdp2(model, tuple({type(module) for module in model.modules() if isinstance(module, LoraLayer)}))


def fsdp1(model: nn.Module, policy: Any = None) -> Engine:
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    policy = policy or fsdp_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )

    def gradients() -> Gradients:
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            for name, p in wrapped.named_parameters():
                if p.requires_grad:
                    yield name.replace("_fsdp_wrapped_module.", ""), p.grad

    return torch_engine(model, wrapped, gradients)


def fsdp1_layer(model: nn.Module) -> Engine:
    return fsdp1(model, ModuleWrapPolicy({LlamaDecoderLayer}))


def zero(model: nn.Module, stage: int) -> Engine:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # an extension for sums over shared memory, compiled for a minute on first use: gloo does them too
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=LEARNING_RATE)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def gradients() -> Gradients:
        return ((name, safe_get_full_grad(p)) for name, p in trained)

    return Engine(engine, engine.backward, gradients, engine.step)


ENGINES = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2, per linear": fsdp2_linear,
    "fsdp2, per LoRA layer": fsdp2_lora_layer,
    "fsdp1": fsdp1,
    "fsdp1, per layer": fsdp1_layer,
    **{f"zero{stage}": functools.partial(zero, stage=stage) for stage in (1, 2, 3)},
}


@contextmanager
def process_group() -> Iterator[int]:
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        dist.barrier()  # a process that leaves first takes the other's connection along
    finally:
        dist.destroy_process_group()


def main(engines: list[str], directory: Path) -> None:
    torch.manual_seed(0)
    with process_group() as rank:
        for engine in engines:
            # FSDP1 flattens the weights of a module into one tensor: they have to have one dtype
            storage = torch.float32 if engine.startswith("fsdp1") else torch.uint8
            for case in CASES:
                model = make(case, storage)
                pyfastlora.patch(model)
                try:
                    seen = train(ENGINES[engine](model), rank)
                    seen.report = pyfastlora.report(model).to_dict()["rows"]
                    found = asdict(seen)
                except Exception:
                    found = {"error": traceback.format_exc()}
                torch.save(found, directory / f"{engine} {case} {rank}.pt")


if __name__ == "__main__":
    # processes that wait for each other would do so for good
    faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)
    main(sys.argv[1].split("/"), Path(sys.argv[2]))
