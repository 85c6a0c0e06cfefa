"""What could break: the order of the two products, which decides the last bit; ranges, pitches, widths."""

import numpy as np
import pytest
import torch
from accuracy import DEVICE, FLOATS, assert_fence_untouched, fenced, implementations, name_of, noise

from pyfastlora.ops import Packed8bit, backend, dequant_8bit

SHAPES = [(1, 1, 1), (3, 5, 9), (7, 96, 96), (16, 64, 72), (5, 129, 130), (70, 1376, 1376)]  # O, I, pitch


def packed_weight(outer, inner, pitch, dtype=torch.bfloat16):
    """Random bytes and scales, rows `pitch` apart."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(-128, 128, (outer, pitch), dtype=np.int8)).to(DEVICE)
    absmax = torch.from_numpy(rng.uniform(0.01, 3, outer).astype(np.float32)).to(DEVICE)
    return Packed8bit(values[:, :inner], absmax, dtype)


def by_hand(w):
    """The definition, in numpy's float32."""
    scaled = w.values.cpu().numpy().astype(np.float32) * w.absmax.cpu().numpy()[:, None]
    out = scaled * np.float32(7.874015718698502e-3)
    assert out.dtype == np.float32
    return torch.from_numpy(out).to(DEVICE)


@pytest.mark.parametrize("name", implementations("dequant_8bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("outer", "inner", "pitch"), SHAPES)
def test_bit_equal_to_the_definition(name, outer, inner, pitch, dtype):
    w = packed_weight(outer, inner, pitch)
    with backend(f"dequant_8bit={name}"):
        assert torch.equal(dequant_8bit(w, dtype), by_hand(w).to(dtype))


@pytest.mark.parametrize("name", implementations("dequant_8bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [((0, 7), (3, 90)), ((2, 3), (0, 1)), ((6, 7), (95, 96)), ((1, 5), (8, 48)), ((3, 3), (0, 96))],
)
def test_panels_touch_nothing_else(name, dtype, rows, cols):
    w = packed_weight(7, 96, 96)
    want = by_hand(w).to(dtype)[rows[0] : rows[1], cols[0] : cols[1]]
    for margin in (5, 8):
        out, everything = fenced(rows[1] - rows[0], cols[1] - cols[0], dtype, margin)
        with backend(f"dequant_8bit={name}"):
            dequant_8bit(w, rows=rows, cols=cols, out=out)
        assert torch.equal(out, want)
        assert_fence_untouched(everything, margin)


def test_bit_equal_to_bitsandbytes():
    bnb = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: pip install pyfastlora[qlora]"
    )
    values, absmax, _ = bnb.int8_vectorwise_quant(noise(64, 192, dtype=torch.float16, seed=3))
    ours = dequant_8bit(Packed8bit(values, absmax, torch.float16), torch.float32)
    assert torch.equal(ours, bnb.int8_vectorwise_dequant(values, absmax))


def test_float64_goes_to_the_reference():
    w = packed_weight(4, 8, 8)
    assert torch.equal(dequant_8bit(w, torch.float64), by_hand(w).double())


def test_errors_say_what_was_wrong():
    w = packed_weight(4, 8, 8)
    with pytest.raises(ValueError, match=r"rows \(0, 5\) .* must lie inside the weight \[4, 8\]"):
        dequant_8bit(w, rows=(0, 5))
    with pytest.raises(ValueError, match=r"out must be \[4, 8\]"):
        dequant_8bit(w, out=torch.empty(4, 7))
    with pytest.raises(ValueError, match=r"values must be \[O, I\] int8; got \[4, 8\] float32"):
        Packed8bit(w.values.float(), w.absmax, torch.float32)
    with pytest.raises(ValueError, match=r"absmax must be \[4\] float32"):
        Packed8bit(w.values, w.absmax[:3], torch.float32)
