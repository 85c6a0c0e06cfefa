"""What Triton makes of every kernel for every arch, without a GPU: registers, spills and shared memory.

    rows()    a dict per launch and arch: stem, case, kernel, arch, config, registers, spills, shared, limit

The launchers run on tensors without storage, under a driver that names the arch and launches nothing: what is
compiled is what would run there, with the shipped configurations. For a process of its own: it replaces
Triton's driver.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pyfastlora.kernels_triton import _tuning
from pyfastlora.ops import DropoutMask, Packed4bit
from pyfastlora.ops.dequant_8bit import Packed8bit

# Bytes of shared memory that one program may have: CUDA programming guide, compute capabilities; AMD's LDS.
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
    "gfx1100": 64 << 10,
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the launcher `name` of kernels_triton/<stem>.py."""

    stem: str
    case: str
    run: Callable[[], object]


def cases() -> Iterator[Case]:
    """Calls that between them meet every kernel, configuration and kind of operand."""
    for dtype in (BF16, F32):
        yield from _elementwise(dtype)
        yield from _four_bit(dtype)
    few_and_many = (512, 2048, 8192)
    yield from _low_rank(BF16, F32, 16, few_and_many, (1024, 4096))
    yield from _low_rank(F16, F32, 64, few_and_many, (4096,))
    yield from _low_rank(BF16, BF16, 64, (8192,), (1024,))
    yield from _low_rank(F32, F32, 64, (8192,), (4096,))
    w = Packed8bit(_empty(4096, 4096, dtype=torch.int8), _empty(4096, dtype=F32), BF16)
    yield _case("dequant_8bit", "bfloat16", w, 0, 0, _empty(4096, 4096))
    yield _case("dropout_mask", "pack", _empty(2048, 4096, dtype=torch.bool), name="pack")


def _elementwise(dtype: torch.dtype) -> Iterator[Case]:
    y = _empty(2048, 14336, dtype=dtype)
    yield _case("glu", f"forward, {_name(dtype)}", y, y, "gelu_tanh", y, name="glu_forward")
    yield _case("glu", f"backward, {_name(dtype)}", *(y,) * 3, "gelu_tanh", *(y,) * 3, name="glu_backward")
    yield _case("dora_grad", _name(dtype), y, y, _empty(14336, dtype=F32))
    yield _case("dropout_apply", _name(dtype), y, _mask(y), y)


def _four_bit(dtype: torch.dtype) -> Iterator[Case]:
    a, b = _empty(16, 4096, dtype=F32), _empty(14336, 16, dtype=F32)
    for cols in (2048, 4096):
        out = _empty(4096, cols, dtype=dtype)
        yield _case("dequant_4bit", f"{cols} columns, {_name(dtype)}", _nf4(4096, cols, dtype), 0, 0, out)
    odd = _nf4(4096, 2044, dtype)
    yield _case("dequant_4bit", f"2044 columns, {_name(dtype)}", odd, 0, 0, _empty(4096, 2044, dtype=dtype))
    w = _nf4(14336, 4096, dtype)
    yield _case("dora_norm", f"4 bits of {_name(dtype)}", w, a, b, 2.0)
    x, y = _empty(8, 4096, dtype=dtype), _empty(8, 14336, dtype=dtype)
    yield _case("matmul_4bit", f"x W^T, {_name(dtype)}", x, w, False, dtype, y)
    yield _case("matmul_4bit", f"dy W, {_name(dtype)}", y, w, True, dtype, x)


def _low_rank(
    dtype: torch.dtype, factor: torch.dtype, ranks: int, tokens: tuple[int, ...], outs: tuple[int, ...]
) -> Iterator[Case]:
    cols, what = 4096, f"{_name(dtype)}, factor {_name(factor)}, rank {ranks}"
    a, b = _empty(ranks, cols, dtype=factor), _empty(cols, ranks, dtype=factor)
    for rows in tokens:
        x = _empty(rows, cols, dtype=dtype)
        yield _case("lora_shrink", f"{what}, {rows} tokens", x, a, False, _mask(x), 1.0)
    s, bias = _empty(rows, ranks, dtype=F32), _empty(cols, dtype=dtype)
    yield _case("lora_expand", what, x, s, b, False, _mask(x), 2.0, bias, bias, x)
    yield _case("lora_grad", what, s, x, _mask(x), 1.0, False, factor)
    few = f"{_name(dtype)}, factor {_name(factor)}, rank 3"  # few enough for one pass on every chip
    yield _case("lora_backward", few, x, b[:, :3], s[:, :3], 2.0, factor)
    for rows in outs:
        w = _empty(rows, cols, dtype=dtype)
        yield _case("dora_norm", f"{what}, {rows} rows", w, a, b[:rows], 2.0)


def _case(stem: str, case: str, *arguments: Any, name: str = "") -> Case:
    launcher = getattr(importlib.import_module(f"pyfastlora.kernels_triton.{stem}"), name or stem)
    return Case(stem, case, partial(launcher, *arguments))


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _mask(x: Tensor) -> DropoutMask:
    return DropoutMask(_empty(x.shape[0], (x.shape[1] + 15) // 16 * 2, dtype=torch.uint8), 1.25)


def _nf4(rows: int, cols: int, dtype: torch.dtype) -> Packed4bit:
    blocks = rows * cols // 64
    absmax, nested = _empty(blocks, dtype=torch.uint8), (256, -(-blocks // 256), 1)
    scales = (_empty(count, dtype=F32) for count in nested)
    packed = _empty(rows * cols // 2, dtype=torch.uint8)
    return Packed4bit(packed, absmax, (rows, cols), dtype, 64, "nf4", *scales)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- compiling ----


def rows(archs: Iterable[str] = tuple(SHARED), wanted: Iterable[Case] = ()) -> list[dict[str, Any]]:
    """What became of the kernels of the wanted cases (default: all), in bytes but for the registers."""
    found = []
    every = tuple(wanted) or tuple(cases())
    for arch in archs:
        with _compiling_for(arch) as made:
            for case in every:
                case.run()
                for kernel, config, compiled in made:
                    about = {"stem": case.stem, "case": case.case, "kernel": kernel, "arch": arch}
                    about |= {"config": config} | _resources(arch, compiled)
                    found.append(about | {"limit": SHARED[arch]})
                made.clear()
    return found


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        if self.arch.startswith("sm_"):
            return GPUTarget("cuda", int(self.arch[3:]), 32)
        return GPUTarget("hip", self.arch, 32 if self.arch.startswith("gfx1") else 64)

    def get_current_device(self) -> str:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(arch: str) -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """Launches compile for `arch` and run nothing; gives (kernel, configuration, what was made) of each."""
    made: list[tuple[str, dict[str, Any], Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **keywords)
        config = {key: value for key, value in keywords.items() if key in _CONFIG}
        made.append((self.fn.__name__, config, compiled))
        return compiled

    JITFunction.run = run
    triton.runtime.driver.set_active(_Driver(arch))
    _tuning.forget()
    try:
        yield made
    finally:
        JITFunction.run = launch
        triton.runtime.driver.set_active(None)  # to be looked for again
        _tuning.forget()


_CONFIG = ("BLOCK", "BLOCK_T", "BLOCK_I", "BLOCK_O", "BLOCK_R", "STAGES", "num_warps", "num_stages")


def _resources(arch: str, compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes that spilled ones take of its memory, bytes of shared memory a program."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        count = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        registers, spills = count["vgpr_count"], count["private_segment_fixed_size"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        registers, spills = count["REG"], count["STACK"] + count["LOCAL"]
    return {"registers": registers, "spills": spills, "shared": int(compiled.metadata.shared)}
