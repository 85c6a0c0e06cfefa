"""What only a GPU can show of an op: that a CUDA graph takes it, that it waits for nothing, and that it keeps
to one device."""

from __future__ import annotations

import pytest
import torch
from accuracy import DEVICE, implementations

from pyfastlora import ops
from pyfastlora.ops import _registry, _tune

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")

SHAPE = _tune.Shape(tokens=40, ins=256, outs=128, ranks=16)
CALLS = [
    pytest.param(op.name, name, id=f"{op.name}-{name}")
    for op in ops.all_ops()
    for name in implementations(op.name)
    if name != "reference" and DEVICE.type == "cuda"
]


def call_of(op, name):
    """A call of one implementation, which has run before: kernels are there, and what they reuse."""
    if op == "lora_expand":  # in place: into a fresh tensor each time, so that calls are alike
        y, s, b = (torch.randn(size, device=DEVICE).bfloat16() for size in ((40, 128), (40, 16), (16, 128)))
        s = s.float()
        call = lambda: ops.lora_expand(y, s, b, transposed=True, out=torch.empty_like(y))  # noqa: E731
    else:
        call = _tune.subject(op, SHAPE, torch.bfloat16, DEVICE)

    def run():
        with ops.backend(f"{op}={name}"):
            return call()

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    return run


def tensors(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [part if isinstance(part, torch.Tensor) else part.bits for part in parts]


@pytest.mark.parametrize(("op", "name"), CALLS)
def test_captured_in_a_graph_it_gives_the_same_again(op, name):
    run = call_of(op, name)
    expected = [part.clone() for part in tensors(run())]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(run())
    for part in captured:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, expected, strict=True):
        if op == "dropout_mask":  # another draw
            assert found.count_nonzero() > found.numel() / 2
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(("op", "name"), CALLS)
def test_it_does_not_wait_for_the_gpu(op, name):
    run = call_of(op, name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_another_gpu_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (op,) = (op for op in ops.all_ops() if op.name == "dora_grad")
    if reason := dict(op.candidates(_registry.problem_of(DEVICE, torch.float32)))["gpu"]:
        pytest.skip(reason)
    dy, z, gain = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, device="cuda:1")
    with pytest.raises(RuntimeError, match="gain must be on the GPU with the other tensors"):
        torch.ops.pyfastlora.dora_grad(dy, z, gain, torch.empty_like(z), torch.empty(8))
