"""What could break: a request that quietly becomes another backend, a refusal without reasons, requests that
outlive their block.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from pyfastlora.ops import BackendError, Problem, all_ops, backend, glu_forward
from pyfastlora.ops._registry import Implementation, Op, always, parse_requests

CPU_BF16 = Problem("cpu", "avx512", "bfloat16")


@pytest.fixture
def op():
    calls = []
    made = Op(
        "test_op",
        Implementation("gpu", lambda x: calls.append("gpu"), lambda p: f"needs a GPU; this is {p.device}"),
        Implementation(
            "cpu", lambda x: calls.append("cpu"), lambda p: None if p.dtype != "float64" else "has no float64"
        ),
        Implementation("reference", lambda x: calls.append("reference"), always),
    )
    made.calls = calls
    yield made
    from pyfastlora.ops import _registry

    del _registry._ops["test_op"]


def test_the_first_without_an_objection_runs(op):
    assert op.choose(CPU_BF16).name == "cpu"
    assert op.choose(Problem("cpu", "avx512", "float64")).name == "reference"
    for dtype in (torch.float32, torch.float64, torch.float32):
        x = torch.zeros(1, dtype=dtype, device="cpu")
        op.pick(x)(x)
    assert op.calls == ["cpu", "reference", "cpu"]


def test_a_request_holds_inside_its_block_only(op):
    x = torch.zeros(1, device="cpu")
    with backend("reference"):
        op.pick(x)(x)
        with backend("test_op=cpu"):
            op.pick(x)(x)
        op.pick(x)(x)
    op.pick(x)(x)
    assert op.calls == ["reference", "cpu", "reference", "cpu"]


def test_a_request_that_cannot_be_met_names_every_candidate(op):
    with backend("gpu"), pytest.raises(BackendError) as refused:
        op.pick(torch.zeros(1, device="cpu"))
    text = str(refused.value)
    assert "test_op: `gpu` was requested and cannot take cpu" in text
    assert "gpu        needs a GPU; this is cpu" in text
    assert "cpu        can: FASTLORA_BACKEND=test_op=cpu" in text
    with backend("triton"), pytest.raises(BackendError, match="triton     has no implementation of this op"):
        op.pick(torch.zeros(1, device="cpu"))
    with backend("cpu"), pytest.raises(BackendError, match="cpu        has no float64"):
        op.pick(torch.zeros(1, dtype=torch.float64, device="cpu"))


def test_requests_are_parsed_strictly():
    assert parse_requests("cpu") == {"*": "cpu"}
    assert parse_requests("glu_forward=reference, dequant_4bit=cpu") == {
        "glu_forward": "reference",
        "dequant_4bit": "cpu",
    }
    assert parse_requests("glu=triton") == {"glu_forward": "triton", "glu_backward": "triton"}
    assert parse_requests("auto") == parse_requests("") == {}
    with pytest.raises(ValueError, match="backend 'cuda'.*choose one of auto, gpu, triton, cpu, reference"):
        parse_requests("cuda")
    with pytest.raises(ValueError, match="no op named glu_foward"):
        parse_requests("glu_foward=cpu")


def test_every_op_has_a_reference_and_compiled_cpu_kernels():
    for op in all_ops():
        found = dict(op.candidates(CPU_BF16))
        assert found["cpu"] is found["reference"] is None, op.name
        assert list(found)[-2:] == ["cpu", "reference"]
        in_float64 = dict(op.candidates(Problem("cpu", "avx512", "float64")))
        assert in_float64["cpu"] == "has float16, bfloat16, float32; this is float64"


def test_triton_comes_before_the_cpu_kernels_and_only_on_a_gpu():
    triton = [op for op in all_ops() if any(i.name == "triton" for i in op.implementations)]
    assert {op.name for op in triton} >= {"glu_forward", "glu_backward"}
    for op in triton:
        assert dict(op.candidates(CPU_BF16))["triton"] == "needs GPU tensors; these are on cpu"
        on_gpu = dict(op.candidates(Problem("cuda", "sm_90", "bfloat16")))
        assert on_gpu["triton"] == (
            None if find_spec("triton") else "needs Triton: pip install pyfastlora[triton]"
        )
        assert on_gpu["cpu"] == "needs CPU tensors; these are on cuda"


def test_the_environment_variable_is_a_request():
    code = (
        "import torch; from pyfastlora.ops import all_ops, Problem, glu_forward\n"
        "print({op.name: op.choose(Problem('cpu', '', 'float32')).name for op in all_ops()})"
    )

    def run(spec: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "FASTLORA_BACKEND": spec}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    chosen = eval(run("reference,glu_forward=cpu").stdout)
    assert chosen.pop("glu_forward") == "cpu" and set(chosen.values()) == {"reference"}
    assert "ValueError: backend 'glu_foward=cpu': no op named glu_foward" in run("glu_foward=cpu").stderr


def test_traces_without_a_graph_break():
    torch._dynamo.reset()
    gate, up = torch.randn(4, 16), torch.randn(4, 16)
    compiled = torch.compile(glu_forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), glu_forward(gate, up))
