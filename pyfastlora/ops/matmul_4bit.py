"""matmul_4bit: products with a 4-bit weight that never exists whole as a dense tensor.

    y = x W^T   (transposed=False)   x [T, I] -> y [T, O]
    y = x W     (transposed=True)    x [T, O] -> y [T, I]   the input gradient

W takes x's dtype, as in bitsandbytes' gemm_4bit (bitsandbytes/backends/default/ops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._arena import scratch
from pyfastlora.ops._registry import Implementation, Op, always, arch_of, why_not_cpu
from pyfastlora.ops.dequant_4bit import Packed4bit, dequant_4bit

# Rows of x up to which the decoding kernel beats decode + GEMM: it decodes W once per 4 rows
# (bench_matmul_4bit).
FEW_ROWS = 4
# Bytes of W decoded at a time. Smaller panels stay closer to the core but starve the vendor's GEMM of
# columns: [4096, 4096] bfloat16, T = 512: 13.6, 11.7, 8.9, 9.3 ms at 1, 2, 8, 32 MiB on two Xeon cores
# (bench_matmul_4bit).
PANEL_BYTES = 8 << 20


def matmul_4bit(
    x: Tensor,
    w: Packed4bit,
    *,
    transposed: bool = False,
    values: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x W^T, or x W when `transposed`.

    x [T, I] (or [T, O]), float, packed columns. values: a dtype W is rounded to before it takes x's. Returns
    [T, O] (or [T, I]) in x's dtype: new, or `out`. Raises ValueError when x does not fit the weight.
    """
    inner, outer = w.shape if transposed else (w.shape[1], w.shape[0])
    if x.dim() != 2 or x.shape[1] != inner:
        raise ValueError(
            f"matmul_4bit: x must be [T, {inner}] for a weight of {list(w.shape)}; got {list(x.shape)}"
        )
    if out is None:
        out = x.new_empty(x.shape[0], outer)
    OP.pick(x)(x, w, transposed, values or x.dtype, out)
    return out


def reference(x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor) -> None:
    dense = dequant_4bit(w, values).to(x.dtype)
    torch.mm(x, dense if transposed else dense.t(), out=out)


def cpu(x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor) -> None:
    """Decodes on the fly for a few rows, and for any number on AMX; else panels in one reused buffer and a
    GEMM.
    """
    rows, cols = w.shape
    if values == x.dtype and (_on_tiles(x, w) or (x.shape[0] <= FEW_ROWS and not transposed)):
        torch.ops.pyfastlora.matmul_4bit(
            x if x.stride(1) == 1 else x.contiguous(), *w.native, transposed, out
        )
        return
    outer, inner = (cols, rows) if transposed else (rows, cols)
    width = max(64, PANEL_BYTES // max(1, inner * x.element_size()) // 64 * 64)
    for begin in range(0, outer, width):
        end = min(begin + width, outer)
        span = (begin, end)
        shape = (rows, end - begin) if transposed else (end - begin, cols)
        panel = scratch(shape, values, x.device)
        dequant_4bit(w, rows=None if transposed else span, cols=span if transposed else None, out=panel)
        if values != x.dtype:
            panel = scratch(shape, x.dtype, x.device).copy_(panel)
        torch.mm(x, panel if transposed else panel.t(), out=out[:, begin:end])


def _on_tiles(x: Tensor, w: Packed4bit) -> bool:
    """Whether the native op takes any number of rows, and the transposed product: AMX decodes runs of 32
    weights.
    """
    return x.dtype == torch.bfloat16 and w.shape[1] % 32 == 0 and arch_of(x.device) == "amx"


OP = Op(
    "matmul_4bit", Implementation("cpu", cpu, why_not_cpu), Implementation("reference", reference, always)
)
