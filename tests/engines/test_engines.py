"""Two processes under DDP, DeepSpeed ZeRO and FSDP: losses and gradients are those of one process in PEFT.

Broken by a parameter that is read before or behind the engine's back, a gradient that is not averaged, a
group that reads weights nobody gathered, a recomputation that saves other tensors than its forward.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import bitsandbytes
from patching.models import difference

from .cases import CASES, STEPS, Trained, make, single, train

pytestmark = pytest.mark.cpu_only("two processes would share the GPU, which NCCL refuses")

TORCH = ("ddp", "fsdp2", "fsdp2, per LoRA layer", "fsdp2, per linear", "fsdp1", "fsdp1, per layer")
DEEPSPEED = ("zero1", "zero2", "zero3")

#: Engines that leave siblings their one input, and their parameters in reach of one another.
GROUPED = ("ddp", "fsdp2", "zero1", "zero2")
#: Engines that wrap what is inside a LoRA layer, or give its base weight a gradient: PEFT runs, and says why.
REASONS = {
    "fsdp2, per linear": "is a FSDPLinear, not",
    "fsdp1": "lora_A is a FullyShardedDataParallel, not nn.Linear",
    "fsdp1, per layer": "base_layer.weight requires grad: fused layers keep it frozen",
}
#: What does not run without us either, and what is said then.
REFUSED = {
    ("fsdp2, per linear", "dora"): "got mixed torch.Tensor and DTensor",
    ("fsdp1", "dora"): "tuple index out of range",
}
SECONDS = 480


@functools.cache
def launched(engines: tuple[str, ...]) -> Path:
    """Run every case of these engines in one pair of processes; the folder of what they saw."""
    folder = Path(tempfile.mkdtemp(prefix="fastlora-engines-"))
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(here / "worker.py"), "/".join(engines), str(folder), str(SECONDS)),
        ],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS + 60,
    )
    (folder / "log").write_text(done.stdout)
    return folder


@functools.cache
def alone(case: str) -> Trained:
    return train(single(make(case)))


def seen(engine: str, case: str) -> list[dict[str, Any]]:
    folder = launched(TORCH if engine in TORCH else DEEPSPEED)
    files = [folder / f"{engine} {case} {rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), (folder / "log").read_text()[-8000:]
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", [*TORCH, *DEEPSPEED])
def test_losses_and_gradients_are_those_of_one_process(engine: str, case: str) -> None:
    if engine in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: DS_BUILD_OPS=0 pip install pyfastlora[deepspeed]")
    adapter, _, checkpointed = case.partition(", ")
    if adapter == "qlora":
        bitsandbytes()
    found = seen(engine, case)
    if refusal := REFUSED.get((engine, adapter)):
        assert all(refusal in each["error"] for each in found)
        return
    assert not [each["error"] for each in found if "error" in each]

    peft = alone(case)
    assert peft.losses[-1] < peft.losses[0] - 0.02  # it learns: a curve that stays flat would compare nothing
    for step in range(STEPS):
        loss = sum(each["losses"][step] for each in found) / len(found)
        assert loss == pytest.approx(peft.losses[step], rel=1e-6)
        for each in found:
            gradients = each["gradients"][step]
            assert gradients.keys() == peft.gradients[step].keys()
            for name, exact in peft.gradients[step].items():
                assert difference(gradients[name], exact) < 5e-6, (step, name)
    for each in found:
        assert_ran(engine, each["report"], checkpointed=bool(checkpointed))


def assert_ran(engine: str, report: list[dict[str, Any]], *, checkpointed: bool) -> None:
    """Fused, with groups where the engine leaves them, or PEFT's forward with the reason."""
    assert len(report) == 14
    for row in report:
        calls = STEPS * (2 if checkpointed else 1)
        counted = row["calls_fused"] + row["calls_fallback"]
        # a recomputation stops at the last tensor that was saved: inside the block that ends a layer
        assert counted == calls or (checkpointed and ".mlp." in row["name"]), row
        if engine in REASONS:
            assert REASONS[engine] in row["reason"] and row["calls_fused"] == 0, row
        else:
            assert row["fused"] and row["calls_fallback"] == 0, row
        if engine in GROUPED and row["name"].endswith(("q_proj", "k_proj", "v_proj")):
            assert row["region"] == "group q_proj, k_proj, v_proj"
