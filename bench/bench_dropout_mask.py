"""What does drawing a dropout mask cost, with torch's generator and torch's numbers?

Bytes: T I / 8 written, nothing read: the generator, not memory, sets the time, and the share of a copy's
bandwidth says how far from free the draw is. bernoulli_: the same draw by torch, a byte per element;
F.dropout: draw and product.
"""

import pytest
import torch
import torch.nn.functional as F

from bench._cases import ACTIVATIONS, noise, ours, short
from pyfastlora.ops import dropout_mask


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=short)
@pytest.mark.parametrize("variant", [*ours("dropout_mask"), "bernoulli_", "F.dropout"])
def test_dropout_mask(measure, variant, shape):
    x = noise(*shape, dtype=torch.float32)
    drawn = torch.empty(shape, dtype=torch.bool, device=x.device)

    def call():
        dropout_mask(x, 0.1)

    if variant == "bernoulli_":

        def call():
            drawn.bernoulli_(0.9)

    elif variant == "F.dropout":

        def call():
            F.dropout(x, 0.1)

    measure("dropout_mask", variant, call, case=short(shape), dtype=torch.float32, moved=x.numel() // 8)
