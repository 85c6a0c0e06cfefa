"""The Triton kernels without a GPU: every test of an op that names the implementation "triton" in Triton's
interpreter, and every kernel compiled for every arch as its launcher would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import covered
import pytest

pytest.importorskip("triton", reason="needs Triton: pip install pyfastlora[triton]")

HERE = Path(__file__).parent
pytestmark = pytest.mark.cpu_only("the interpreter; on a GPU the same tests run there")
# Three archs compile everything, sm_120 as the one of NVIDIA's with least shared memory; the others bfloat16,
# and what needs most registers: float16, float32 factors.
COMPILE = """
import json, sys
from bench.hardware_triton import SHARED, cases, rows
every = tuple(cases())
most = [case for case in every if "float32" not in case.case.replace("factor float32", "")]
most = [case for case in most if "factor bfloat16" not in case.case]
archs = [arch for arch in SHARED if arch.startswith(sys.argv[1])]
print(json.dumps([row for arch in archs for row in rows([arch], every if arch in sys.argv[2:] else most)]))
"""

# Tensors without storage stand for a GPU's: nothing is run.
TRACE = """
import torch, torch.utils._triton, triton
torch.utils._triton.has_triton = lambda: True
from bench.hardware_triton import _Driver
from pyfastlora import ops
from pyfastlora.ops import _registry

triton.runtime.driver.set_active(_Driver("sm_90"))
_registry.problem_of = lambda device, dtype: _registry.Problem("cuda", "sm_90", str(dtype)[6:])

def step(x, a, b, bits):
    mask = ops.DropoutMask(bits, 1.25)
    s = ops.lora_shrink(x, a, mask=mask)
    y = ops.lora_expand(torch.empty_like(x), s, b, mask=mask)
    return ops.lora_grad(s, x, mask=mask), ops.glu_forward(x, y), ops.dora_norm(y[:48], a, b[:48], 2.0)

launches = []

def backend(graph, inputs):
    launches.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
    return graph.forward

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")

step = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
with ops.backend("triton"):
    for op in ops.all_ops():
        op.pick(empty(1, dtype=torch.bfloat16))  # the dispatcher's first choice recompiles once
    for tokens in (63, 61, 50):
        x, bits = empty(tokens, 128, dtype=torch.bfloat16), empty(tokens, 16, dtype=torch.uint8)
        step(x, empty(16, 128), empty(128, 16), bits)
print(launches)
"""


def run(*arguments, **env):
    env = {**os.environ, "FASTLORA_TEST_SHARD": "0/1", **env}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_checkout_on_the_path_brings_its_own_kernels(tmp_path):
    """Nothing is installed, or another checkout is."""
    for name in ("pyfastlora", "kernels_triton"):
        (tmp_path / name).symlink_to(HERE.parents[1] / name)
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
from pyfastlora.ops import all_ops
from pyfastlora.kernels_triton import glu
print(glu.__file__)
"""
    assert run("-c", code, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1") == str(
        tmp_path / "kernels_triton" / "glu.py"
    )


def test_numerics_in_the_interpreter():
    arguments, env = covered.arguments_of("interpreted")
    said = run("-m", "pytest", *arguments, f"--ignore={__file__}", **env)
    assert "passed" in said and "failed" not in said and "skipped" not in said, said


@pytest.mark.parametrize(
    ("family", "whole"), [("sm_", ("sm_90", "sm_120")), ("gfx", ("gfx942",))], ids=["cuda", "hip"]
)
def test_every_kernel_compiles_within_what_the_chip_has(family, whole, tmp_path):
    rows = json.loads(run("-c", COMPILE, family, *whole, TRITON_CACHE_DIR=str(tmp_path)))
    assert len({row["arch"] for row in rows}) == 4
    kernels = {path.stem for path in (HERE.parents[1] / "kernels_triton").glob("[!_]*.py")}
    assert {row["stem"] for row in rows} == kernels
    wrong = [row for row in rows if row["spills"] or row["shared"] > row["limit"]]
    assert not wrong, "\n".join(map(str, wrong))


def test_traces_in_one_graph_for_any_number_of_tokens():
    assert run("-c", TRACE) == "[5]"
