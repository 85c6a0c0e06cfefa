"""The kernels as functions: each picks the best implementation for its tensors (`fastlora info` shows the
choices).

Every op has a torch reference, which also runs in float64, compiled kernels for CPUs and GPUs, and Triton
kernels; `pyfastlora.backend("reference")` forces one for the calls inside.
"""

from pyfastlora.ops._registry import BackendError, Problem, all_ops, backend, obey_environment
from pyfastlora.ops.dequant_4bit import Packed4bit, dequant_4bit
from pyfastlora.ops.dequant_8bit import Packed8bit, dequant_8bit
from pyfastlora.ops.dora_grad import dora_grad
from pyfastlora.ops.dora_norm import dora_norm
from pyfastlora.ops.dropout_apply import dropout_apply
from pyfastlora.ops.dropout_mask import DropoutMask, dropout_mask
from pyfastlora.ops.glu import glu_backward, glu_forward
from pyfastlora.ops.lora_backward import lora_backward
from pyfastlora.ops.lora_expand import lora_expand
from pyfastlora.ops.lora_grad import lora_grad, lora_grad_many
from pyfastlora.ops.lora_shrink import lora_shrink, lora_shrink_many
from pyfastlora.ops.matmul_4bit import matmul_4bit

__all__ = [
    "BackendError",
    "DropoutMask",
    "Packed4bit",
    "Packed8bit",
    "Problem",
    "all_ops",
    "backend",
    "dequant_4bit",
    "dequant_8bit",
    "dora_grad",
    "dora_norm",
    "dropout_apply",
    "dropout_mask",
    "glu_backward",
    "glu_forward",
    "lora_backward",
    "lora_expand",
    "lora_grad",
    "lora_grad_many",
    "lora_shrink",
    "lora_shrink_many",
    "matmul_4bit",
]

obey_environment()
