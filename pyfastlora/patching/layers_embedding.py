"""The class of a patched LoRA embedding."""

from __future__ import annotations

from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from pyfastlora.fused.embedding import AdaptedEmbedding, fused_embedding
from pyfastlora.patching.conditions import PLAIN, Kind
from pyfastlora.patching.layers import STATE, FusedForward, by_backend


class FastLoraEmbedding(FusedForward, Embedding):
    """`peft.tuners.lora.layer.Embedding` over a dense `nn.Embedding`."""

    peft_class = Embedding
    kind = Kind(bases=(nn.Embedding,), weights=PLAIN, packed=0, region="embedding")

    def run_fused(self, x: Tensor, found: AdaptedEmbedding) -> Tensor:
        with by_backend(self.__dict__[STATE].backend):
            return fused_embedding(x, found)
