"""A pytest plugin: the Triton kernels take CPU tensors, run by Triton's interpreter.

    python -m pytest -p interpreted_triton tests/ops -k triton

The ops' own tests then hold the implementation "triton" to the same oracles as every other. A process is
either interpreted or not: the decorator of a kernel decides when its module is imported.
"""

import os

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"
os.environ["FASTLORA_BACKEND"] = "reference"  # of the ops that a test calls without naming a backend: faster
os.environ["FASTLORA_JIT"] = "0"  # nothing that is compiled is called

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pyfastlora.kernels_triton import _tuning


def _cast(self: InterpreterBuilder, handle: TensorHandle, to: tl.dtype) -> TensorHandle:
    """bfloat16 rounded to nearest even, as every GPU does: the interpreter's own conversion truncates."""
    kind = (handle.dtype.scalar, to.scalar)
    if kind == (tl.bfloat16, tl.float32):
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if kind == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
    return _cast_as_it_was(self, handle, to)


_cast_as_it_was, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, _cast

# Large blocks, as a program costs 1.4 ms however little it does, but small enough for every loop to go round.
_tuning.force(
    {
        "lora_shrink": {"BLOCK_T": 16, "BLOCK_I": 64, "BLOCK_R": 128, "programs": 8},
        "lora_expand": {"BLOCK_T": 16, "BLOCK_O": 512, "BLOCK_R": 128},
        "lora_grad": {"BLOCK_T": 16, "BLOCK_I": 512, "BLOCK_R": 128, "programs": 8},
        "lora_backward": {"BLOCK_T": 16, "BLOCK_O": 512, "programs": 8},
        "dora_grad": {"BLOCK_T": 4, "BLOCK_O": 128, "programs": 8},
        "matmul_4bit": {"BLOCK_O": 128, "BLOCK_I": 64, "programs": 8},
    }
)
