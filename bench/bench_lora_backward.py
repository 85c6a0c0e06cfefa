"""What do both products with the output's gradient cost, dS and dB, in one pass over it?

Bytes: dy + B + S (float32) + dS (float32) + dB. apart: `lora_shrink` and `lora_grad`, a pass each; torch: the
two GEMMs in dy's dtype, as autograd runs them.
"""

import pytest

from bench._cases import ACTIVATIONS, PAIRS, RANK, ROUNDED, noise, ours, short
from pyfastlora.ops import lora_backward, lora_grad, lora_shrink


@pytest.mark.parametrize(("dtype", "factor"), PAIRS, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("lora_backward"), *ROUNDED, "apart", "torch"])
def test_lora_backward(measure, variant, shape, dtype, factor):
    dy = noise(*shape, dtype=dtype)
    narrow_b, narrow_s = (
        noise(shape[1], RANK, dtype=dtype, seed=1),
        noise(shape[0], RANK, dtype=dtype, seed=2),
    )
    b, s = narrow_b.to(factor), narrow_s.float()

    def call():
        lora_backward(dy, b, s)

    if variant in ROUNDED:

        def call():
            lora_backward(dy, narrow_b, narrow_s, dtype=factor)

    elif variant == "apart":

        def call():
            lora_shrink(dy, b, transposed=True)
            lora_grad(s, dy, transposed=True, dtype=factor)

    elif variant == "torch":

        def call():
            dy @ narrow_b, dy.t() @ narrow_s

    moved = dy.nbytes + 2 * b.nbytes + 2 * s.nbytes
    case = f"{short(shape)} r={RANK} B {short(factor)}"
    measure("lora_backward", variant, call, case=case, dtype=dtype, moved=moved)
