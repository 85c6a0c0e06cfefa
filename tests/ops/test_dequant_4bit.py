"""What could break: nibble order, blocks that straddle rows or panels, the nested scale's two roundings, odd
counts.
"""

import numpy as np
import pytest
import torch
from accuracy import DEVICE, FLOATS, assert_fence_untouched, fenced, implementations, name_of, noise

from pyfastlora.ops import Packed4bit, backend, dequant_4bit
from pyfastlora.ops.dequant_4bit import OP

SHAPES = [(1, 1), (3, 5), (7, 96), (16, 64), (5, 129), (64, 1376)]


def packed_weight(
    shape, blocksize=64, quant_type="nf4", nested=True, seed=0, dtype=torch.bfloat16
) -> Packed4bit:
    """Random nibbles and scales: no quantiser needed, every code and every scale can occur."""
    rng = np.random.default_rng(seed)
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)

    def tensor(values):
        return torch.from_numpy(values).to(DEVICE)

    packed = tensor(rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8))
    if not nested:
        absmax = tensor(rng.uniform(0.01, 3, blocks).astype(np.float32))
        return Packed4bit(packed, absmax, shape, dtype, blocksize, quant_type)
    return Packed4bit(
        packed,
        tensor(rng.integers(0, 256, blocks, dtype=np.uint8)),
        shape,
        dtype,
        blocksize,
        quant_type,
        nested_code=tensor(np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)),
        nested_absmax=tensor(rng.uniform(0.1, 1, -(-blocks // 256)).astype(np.float32)),
        nested_offset=torch.tensor([1.25], device=DEVICE),
    )


def by_hand(w: Packed4bit) -> torch.Tensor:
    """The definition, in numpy's float32."""
    nf4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    nf4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    nf4 += [
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1,
    ]
    half = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    code = np.array(nf4, np.float32) if w.quant_type == "nf4" else np.concatenate([half, -half])
    packed, scales = w.packed.cpu().numpy(), w.absmax.cpu().numpy()
    if w.nested_code is not None:
        groups = w.nested_absmax.cpu().numpy()[np.arange(scales.size) // 256]
        scales = w.nested_code.cpu().numpy()[scales] * groups + w.nested_offset.cpu().numpy()
    at = np.arange(w.shape[0] * w.shape[1])
    nibbles = np.where(at % 2, packed[at // 2] & 15, packed[at // 2] >> 4)
    out = code[nibbles] * scales[at // w.blocksize]
    assert out.dtype == np.float32
    return torch.from_numpy(out).view(w.shape).to(DEVICE)


@pytest.mark.parametrize("name", implementations("dequant_4bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_equal_to_the_definition(name, shape, quant_type, nested, dtype):
    w = packed_weight(shape, 64, quant_type, nested)
    with backend(f"dequant_4bit={name}"):
        assert torch.equal(dequant_4bit(w, dtype), by_hand(w).to(dtype))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize(blocksize):
    w = packed_weight((37, 333), blocksize)
    assert torch.equal(dequant_4bit(w, torch.float32), by_hand(w))


@pytest.mark.parametrize("name", implementations("dequant_4bit"))
@pytest.mark.parametrize("blocksize", [20, 33, 96])
def test_blocks_that_are_no_power_of_two(name, blocksize):
    w = packed_weight((9, 96), blocksize)
    with backend(f"dequant_4bit={name}"):
        assert torch.equal(dequant_4bit(w, torch.float32), by_hand(w))


@pytest.mark.parametrize("name", implementations("dequant_4bit"))
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    ("rows", "cols"), [((0, 7), (3, 90)), ((2, 3), (0, 1)), ((6, 7), (95, 96)), ((3, 3), (0, 96))]
)
def test_panels_touch_nothing_else(name, dtype, rows, cols):
    w = packed_weight((7, 96))
    out, everything = fenced(rows[1] - rows[0], cols[1] - cols[0], dtype)
    with backend(f"dequant_4bit={name}"):
        dequant_4bit(w, rows=rows, cols=cols, out=out)
    assert torch.equal(out, by_hand(w).to(dtype)[rows[0] : rows[1], cols[0] : cols[1]])
    assert_fence_untouched(everything)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=name_of)
def test_bit_equal_to_bitsandbytes(quant_type, nested, storage):
    bnb = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: pip install pyfastlora[qlora]"
    )
    from pyfastlora.weights.bnb_4bit import Bnb4bitWeight, why_not

    weight = noise(128, 192, dtype=torch.bfloat16, seed=3)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    assert why_not(packed, state, None) is None
    ours = Bnb4bitWeight.of(packed, state, None).dequantize(torch.empty_like(weight))
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))
    if nested:  # old checkpoints hold the offset in bfloat16
        state.offset = state.offset.bfloat16()
        w = Bnb4bitWeight.of(packed, state, None).packed
        assert torch.equal(dequant_4bit(w, torch.float32), by_hand(w))


def test_errors_say_what_was_wrong():
    w = packed_weight((4, 8))
    with pytest.raises(ValueError, match=r"rows \(0, 5\) .* must lie inside the weight \[4, 8\]"):
        dequant_4bit(w, rows=(0, 5))
    with pytest.raises(ValueError, match=r"out must be \[4, 8\]"):
        dequant_4bit(w, out=torch.empty(4, 7))
    with pytest.raises(ValueError, match="quant_type must be nf4 or fp4; got 'int4'"):
        Packed4bit(w.packed, w.absmax, (4, 8), torch.float32, 64, "int4")
    with pytest.raises(ValueError, match="packed must be 18 uint8 values"):
        Packed4bit(w.packed, w.absmax, (4, 9), torch.float32, 64, "nf4")


def test_float64_goes_to_the_reference():
    w = packed_weight((4, 8))
    assert OP.choose(__import__("pyfastlora").ops.Problem("cpu", "avx512", "float64")).name == "reference"
    assert torch.equal(dequant_4bit(w, torch.float64), by_hand(w).double())
