"""What was aimed at, and where those aims come from. The report puts what was reached beside them."""

from __future__ import annotations

# PEFT's figures were taken there and the targets set for it: elsewhere GEMM and memory have another ratio.
HOST = "two cores of an AMD EPYC (Zen 5)"

# (level, config, tokens) -> adapter -> (PEFT's tax on HOST, the tax to reach there)
Taxes = dict[tuple[str, str, int], dict[str, tuple[float, float]]]

TAXES: Taxes = {
    ("layer", "bf16", 128): {
        "LoRA": (1.19, 1.08),
        "dropout": (1.55, 1.12),
        "DoRA": (5.60, 1.25),
        "QLoRA": (1.65, 1.10),
        "QDoRA": (6.87, 1.30),
    },
    ("layer", "bf16", 512): {
        "LoRA": (1.14, 1.06),
        "dropout": (1.60, 1.10),
        "DoRA": (2.74, 1.12),
        "QLoRA": (1.33, 1.06),
        "QDoRA": (2.95, 1.15),
    },
    # With whole regions (q/k/v, MLP) fused, which do less than the eager base does.
    ("model", "bf16+fp32", 1024): {
        "LoRA": (1.24, 1.00),
        "dropout": (1.86, 1.05),
        "DoRA": (2.52, 1.10),
        "QLoRA": (1.28, 1.05),
        "QDoRA": (2.03, 1.15),
    },
    ("model", "bf16+fp32 autocast", 1024): {
        "LoRA": (1.07, 1.00),
        "dropout": (1.43, 1.05),
        "DoRA": (2.00, 1.10),
        "QLoRA": (1.15, 1.05),
        "QDoRA": (1.94, 1.15),
    },
}

# On an H200: (model, storage, adapter, tokens) -> the tax of a layer's seven linears in GPU time, at most;
# the wall time of PEFT over ours, at least; what a block keeps for its backward over what PEFT keeps, at
# most; and per cent of a copy's bandwidth that dequantisation, the activation and DoRA's norm reach past the
# L2, at least.
GPU_TAXES = {
    ("8B", "bf16", "LoRA", 8192): 1.06,  # with regions and the K-extension; 1.16 linear by linear
    ("8B", "NF4", "LoRA", 8192): 1.10,
    ("8B", "bf16", "DoRA", 8192): 1.15,
    ("8B", "bf16", "dropout", 8192): 1.15,
}
GPU_WALL = (("8B", "bf16", "LoRA", 512), 1.6)
GPU_SAVED = (("8B", "bf16", "LoRA", 8192), 0.55)
GPU_OP_SHARE = 90

# NF4 unpacking over a memcpy of the bytes it writes, at most.
DEQUANT_OVER_MEMCPY = 1.2
# Milliseconds of DoRA's norms of a 4096 x 4096 NF4 layer on one thread, at most.
DORA_NORM_MS = 10.0

# Of `bench.basics`, at most: seconds on two cores, and what a bfloat16 layer keeps in units of its x.
BASICS = {
    "cold build": 8.0,
    "warm load": 0.05,
    "fastlora --help": 0.2,
    "quickstart": 360.0,
    "kept, LoRA, ours": 0.05,
    "kept, dropout, ours": 0.3,
    "kept, DoRA, ours": 1.1,
    "kept, DoRA, dropout, ours": 2.3,
}
