"""Products of tiles on the matrix units, in float32 accuracy whatever the dtypes of the two sides.

A float32 is the sum of three bfloat16 (3 x 8 bits), a float16 of two, and the products of such parts are
exact in the units' float32 sums. Parts of bfloat16, because it has float32's range: a small factor's float16
parts would underflow, and tf32 exists on one vendor only. An infinity comes out as NaN.
"""

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as its bits and would multiply those: there the parts are widened again.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

EXACT = 32  # products that the matrix units may add up for a result in float32's digits: they truncate


@triton.jit
def dot(x, y, PARTS: tl.constexpr = 3, onto=None):
    """onto + x @ y in float32, for results in float32: to its last bits, or fewer as in `split_dot`.

    Two float32 sides go to the ordinary units: the matrix units truncate as they add.
    """
    if x.dtype == tl.float32 and y.dtype == tl.float32:
        return tl.dot(x, y, onto, input_precision="ieee")
    elif x.dtype == y.dtype and not (INTERPRETED and x.dtype == tl.bfloat16):
        return tl.dot(x, y, onto)
    else:
        return split_dot(x, y, PARTS, onto)


@triton.jit
def split_dot(x, y, PARTS: tl.constexpr = 3, onto=None):
    """onto + x @ y from bfloat16 parts: with 3 to float32's last bits, with 2 to 16 bits.

    Smallest products first; those below the last bit are left out.
    """
    xs = _parts(x, PARTS)
    ys = _parts(y, PARTS)
    total = tl.zeros([x.shape[0], y.shape[1]], tl.float32) if onto is None else onto
    for left in tl.static_range(PARTS):
        for i in tl.static_range(len(xs)):
            if left + i < PARTS and PARTS - 1 - left - i < len(ys):
                part, other = xs[i], ys[PARTS - 1 - left - i]
                if INTERPRETED:
                    part, other = part.to(tl.float32), other.to(tl.float32)
                total = tl.dot(part, other, total)
    return total


@triton.jit
def _parts(v, PARTS: tl.constexpr):
    """v as a tuple of bfloat16 tiles, largest first: as many as its dtype can fill, PARTS at most."""
    first = v.to(tl.bfloat16)
    if v.dtype == tl.bfloat16:
        return (first,)
    else:
        rest = v.to(tl.float32) - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        if v.dtype == tl.float16 or PARTS == 2:
            return (first, second)
        else:
            return (first, second, (rest - second.to(tl.float32)).to(tl.bfloat16))
