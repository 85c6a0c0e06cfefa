"""matmul_4bit: products with a 4-bit weight that never exists whole as a dense tensor.

    y = x W^T   (transposed=False)   x [T, I] -> y [T, O]
    y = x W     (transposed=True)    x [T, O] -> y [T, I]   the input gradient

W takes x's dtype, as in bitsandbytes' gemm_4bit (bitsandbytes/backends/default/ops.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyfastlora.ops._arena import scratch
from pyfastlora.ops._panels import Span, multiply, multiply_in_panels
from pyfastlora.ops._registry import Implementation, Op, always, arch_of, why_not_cpu, why_not_gpu
from pyfastlora.ops._shapes import rows_of, written_rows
from pyfastlora.ops._triton import triton_implementation
from pyfastlora.ops.dequant_4bit import Packed4bit, dequant_4bit

# Rows of x up to which the decoding kernel beats decode + GEMM: it decodes W once per 4 rows
# (bench_matmul_4bit).
FEW_ROWS = 4
# The same for the GPU's kernel: what two tiles of its tensor cores hold. The dense copy and its GEMM move
# nine times the codes' bytes, so more rows would win too, up to 100 and more; that has not been measured
# (bench_matmul_4bit times 1 to 128 rows both ways).
FEW_ROWS_GPU = 16
# The same for Triton's kernel, whose tiles have no fewer rows than these.
FEW_ROWS_TRITON = 16


def matmul_4bit(
    x: Tensor,
    w: Packed4bit,
    *,
    transposed: bool = False,
    values: torch.dtype | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """x W^T, or x W when `transposed`.

    x [..., I] (or [..., O]), float, read in place where its columns are packed, else copied. values: a dtype
    W is rounded to before it takes x's. Returns [..., O] (or [..., I]) in x's dtype: new, or `out`, whose
    columns are packed and to which the product is added when `accumulate`. Raises ValueError when x or out
    does not fit the weight.
    """
    inner, outer = w.shape if transposed else (w.shape[1], w.shape[0])
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ValueError(
            f"matmul_4bit: x must be [..., {inner}] for a weight of {list(w.shape)}; got {list(x.shape)}"
        )
    shape = (*x.shape[:-1], outer)
    if out is None:
        if accumulate:
            raise ValueError("matmul_4bit: accumulate takes out, to be added to")
        out = x.new_empty(shape)
    to = written_rows("matmul_4bit", out, shape)
    OP.pick(x)(rows_of(x), w, transposed, values or x.dtype, to, accumulate)
    return out


def reference(
    x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor, accumulate: bool
) -> None:
    dense = dequant_4bit(w, values).to(x.dtype)
    multiply(x, dense if transposed else dense.t(), out, accumulate)


def cpu(
    x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor, accumulate: bool
) -> None:
    """Decodes on the fly for a few rows, and for any number on AMX; else panels in one reused buffer and a
    GEMM.
    """
    if values == x.dtype and (_on_tiles(x, w) or (x.shape[0] <= FEW_ROWS and not transposed)):
        _decode_on_the_fly(x, w, transposed, out, accumulate)
        return

    def panel(rows: Span | None, cols: Span | None, out: Tensor) -> None:
        if values == out.dtype:
            dequant_4bit(w, rows=rows, cols=cols, out=out)
        else:
            out.copy_(dequant_4bit(w, rows=rows, cols=cols, out=scratch(tuple(out.shape), values, x.device)))

    multiply_in_panels(x, w.shape, panel, out, transposed=transposed, accumulate=accumulate)


def _decode_on_the_fly(x: Tensor, w: Packed4bit, transposed: bool, out: Tensor, accumulate: bool) -> None:
    to = torch.empty(out.shape, dtype=out.dtype, device=out.device) if accumulate else out
    torch.ops.pyfastlora.matmul_4bit.default(x, *w.native, transposed, to)
    if accumulate:
        out.add_(to)


def _on_tiles(x: Tensor, w: Packed4bit) -> bool:
    """Whether the native op takes any number of rows, and the transposed product: AMX decodes runs of 32
    weights.
    """
    return x.dtype == torch.bfloat16 and w.shape[1] % 32 == 0 and arch_of(x.device) == "amx"


def gpu(
    x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor, accumulate: bool
) -> None:
    """Decodes on the fly for a few rows; for more, once, into the reused buffer, and the vendor's GEMM."""
    if values == x.dtype and x.shape[0] <= FEW_ROWS_GPU and not transposed and _on_the_fly(x, w):
        _decode_on_the_fly(x, w, False, out, accumulate)
    else:
        _through_a_copy(x, w, transposed, values, out, accumulate)


def _on_the_fly(x: Tensor, w: Packed4bit) -> bool:
    """Whether the kernel can read x and the codes: in 16 bits, 16 bytes at a time, and blocks by shifts."""
    starts = (x.storage_offset() * 2, x.stride(0) * 2, w.packed.storage_offset())
    aligned = x.stride(1) == 1 and all(start % 16 == 0 for start in starts)
    powers = all(size & (size - 1) == 0 for size in (w.blocksize, w.nested_blocksize))
    return x.element_size() == 2 and aligned and w.shape[1] % 32 == 0 and w.blocksize % 32 == 0 and powers


def _through_a_copy(
    x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor, accumulate: bool
) -> None:
    dense = dequant_4bit(w, out=scratch(w.shape, values, x.device))
    if values != x.dtype:
        dense = scratch(w.shape, x.dtype, x.device).copy_(dense)
    multiply(x, dense if transposed else dense.t(), out, accumulate)


def triton(
    x: Tensor, w: Packed4bit, transposed: bool, values: torch.dtype, out: Tensor, accumulate: bool
) -> None:
    """Decodes on the fly for a few rows; for more, once, into the reused buffer, and the vendor's GEMM."""
    if x.shape[0] <= FEW_ROWS_TRITON and not accumulate:
        _few_rows.run(x, w, transposed, values, out)
    else:
        _through_a_copy(x, w, transposed, values, out, accumulate)


_few_rows = triton_implementation("matmul_4bit", "matmul_4bit")

OP = Op(
    "matmul_4bit",
    Implementation("gpu", gpu, why_not_gpu),
    Implementation("triton", triton, _few_rows.why_not),
    Implementation("cpu", cpu, why_not_cpu),
    Implementation("reference", reference, always),
)
