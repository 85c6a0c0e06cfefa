"""opcheck of every native op, and the op tests again at the lower instruction sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import DEVICE
from test_dequant_4bit import packed_weight

from pyfastlora.ops import _native
from pyfastlora.ops.dropout_mask import pack

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
OF_OPS = ("dequant_4bit", "dequant_8bit", "matmul_4bit", "glu", "lora", "lora_backward", "dora")
OF_OPS += ("dropout_mask", "layouts")


def samples():
    """(op, arguments) for every native op: each with its optional arguments present and absent."""
    w = packed_weight((12, 40))
    single = packed_weight((12, 40), nested=False)
    x, y, s = torch.randn(5, 40), torch.randn(5, 12), torch.randn(5, 3)
    a, b = torch.randn(3, 40), torch.randn(12, 3)
    bits, vector = pack(torch.rand(5, 12) > 0.2), torch.rand(12)
    x_bits = pack(torch.rand(5, 40) > 0.2)
    new = torch.empty_like
    yield "dequant_4bit", (*w.native, 12, 40, 1, 8, torch.empty(4, 16))
    yield "dequant_4bit", (*single.native, 12, 40, 0, 0, torch.empty(12, 40, dtype=torch.bfloat16))
    yield "dequant_8bit", (torch.ones(12, 40, dtype=torch.int8), vector, 1, 8, torch.empty(4, 16))
    x_4bit = torch.randn(2, 64).bfloat16()
    yield "matmul_4bit", (x_4bit, *packed_weight((12, 64)).native, False, x_4bit.new_empty(2, 12))
    yield "glu_forward", (y, y * 2, 0, new(y))
    yield "glu_backward", (y, y * 2, y * 3, 2, new(y), new(y), new(y))
    yield "lora_shrink", (x, a, False, None, 1.0, 0.5, torch.empty(5, 3))
    yield "lora_shrink", (x, a.t().contiguous(), True, x_bits, 1.25, 1.0, torch.empty(5, 3))
    yield "lora_expand", (y, s, b, False, None, 1.0, 2.0, vector, vector, new(y))
    yield "lora_expand", (y, s, b.t().contiguous(), True, bits, 1.25, 1.0, None, None, new(y))
    yield "lora_expand", (None, s, b, False, None, 1.0, 2.0, None, vector, new(y))
    yield "lora_backward", (y, b, s, 0.5, torch.empty(5, 3), torch.empty(12, 3))
    yield "lora_grad", (s, x, x_bits, 1.25, 1.0, False, torch.empty(3, 40))
    yield "lora_grad", (s, x, None, 1.0, 0.5, True, torch.empty(40, 3, dtype=torch.bfloat16))
    yield "dora_norm", (torch.randn(12, 40), a, b, 0.5, torch.empty(12))
    yield "dora_norm_4bit", (*w.native, 1, a, b, 0.5, torch.empty(12))
    yield "dora_grad", (y, y * 2, vector, new(y), torch.empty(12))
    yield "dropout_apply", (x, x_bits, 1.25, new(x))
    yield "dropout_pack", (x > 0, torch.empty(5, 6, dtype=torch.uint8))
    yield "dropout_mask", (torch.get_rng_state(), 0.9, 5, 40, torch.empty(5, 6, dtype=torch.uint8))


@pytest.mark.parametrize("at", [pytest.param(i, id=f"{op}-{i}") for i, (op, _) in enumerate(samples())])
def test_opcheck(at):
    op, arguments = list(samples())[at]  # made again: on the test's device
    assert _native.why_not() is None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyfastlora::{op}", DEVICE.type.upper()):
        pytest.skip(f"{op} has no native kernel for {DEVICE.type}")
    torch.library.opcheck(getattr(torch.ops.pyfastlora, op).default, arguments)


def test_every_native_op_is_checked():
    assert _native.why_not() is None
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyfastlora::")
    }
    assert registered - {"cpu_level"} == {op for op, _ in samples()}


@pytest.mark.cpu_only("instruction sets")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_op_tests_pass_at_every_lower_level(level):
    here = _native.cpu_level()
    if LEVELS.index(level) >= LEVELS.index(here):
        pytest.skip(f"the suite itself runs at {here}; {level} is not below it")
    files = [str(Path(__file__).parent / f"test_{name}.py") for name in OF_OPS]
    env = {**os.environ, "FASTLORA_CPU_LEVEL": level}
    code = (
        "import sys, torch, pytest; from pyfastlora.ops import _native\n"
        "assert _native.cpu_level() == sys.argv[1]\n"
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, level, "-q", "-x", "-p", "no:cacheprovider", *files],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
