"""How near is the gated activation to a copy, and what does torch's own sequence of ops take?

Bytes: forward 3 T O values (gate and up read, the product written); backward 6 T O (dy, gate and up read,
dgate, dup and the product written). torch: `silu(gate) * up`, and the same formulas for the gradients on
whole tensors. Liger, on a GPU: its kernels; the backward writes over gate and up, 5 T O, and gives no
product.
"""

import pytest
import torch
import torch.nn.functional as F

from bench._cases import ACTIVATIONS, DTYPES, ON_GPU, noise, ours, short
from pyfastlora.ops import glu_backward, glu_forward

OTHERS = ["torch", "Liger"] if ON_GPU else ["torch"]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("glu_forward"), *OTHERS])
def test_glu_forward(measure, variant, shape, dtype):
    gate, up = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)

    def call():
        F.silu(gate) * up if variant == "torch" else glu_forward(gate, up)

    if variant == "Liger":
        liger = pytest.importorskip("liger_kernel.ops.swiglu")

        def call():
            liger.swiglu_forward(gate, up)

    measure("glu_forward", variant, call, case=short(shape), dtype=dtype, moved=3 * gate.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("glu_backward"), *OTHERS])
def test_glu_backward(measure, variant, shape, dtype):
    dy, gate, up = (noise(*shape, dtype=dtype, seed=seed) for seed in range(3))

    def call():
        glu_backward(dy, gate, up)

    if variant == "torch":

        def call():
            act = F.silu(gate)
            torch.ops.aten.silu_backward(dy * up, gate), dy * act, act * up

    elif variant == "Liger":
        liger = pytest.importorskip("liger_kernel.ops.swiglu")

        def call():
            liger.swiglu_backward(gate, up, dy)

    measure("glu_backward", variant, call, case=short(shape), dtype=dtype, moved=6 * gate.nbytes)
