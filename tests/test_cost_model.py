"""The cost model against the tables that were published from another implementation of it.

Three numbers are T = 512, 2048 and 8192, rounded as printed there. A wrong byte count or tile moves them.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # bench is part of the checkout, not of the installed package

from bench.cost_model import A100, H200, MODELS, RTX_4090, Cost, known, seconds, tax

TOKENS = (512, 2048, 8192)

H200_TAXES = {
    ("1B", "PEFT fp32+ac LoRA"): "3.07 2.23 2.08",
    ("1B", "PEFT bf16 LoRA"): "2.15 1.70 1.62",
    ("1B", "ours LoRA linear"): "1.67 1.37 1.31",
    ("1B", "ours LoRA kext"): "1.30 1.16 1.11",
    ("1B", "ours LoRA floor"): "1.14 1.06 1.03",
    ("8B", "PEFT fp32+ac LoRA"): "1.83 1.62 1.55",
    ("8B", "PEFT bf16 LoRA"): "1.45 1.34 1.32",
    ("8B", "ours LoRA linear"): "1.25 1.18 1.16",
    ("8B", "ours LoRA grouped"): "1.18 1.13 1.12",
    ("8B", "ours LoRA dual"): "1.14 1.11 1.10",
    ("8B", "ours LoRA kext"): "1.11 1.07 1.05",
    ("70B", "PEFT fp32+ac LoRA"): "1.33 1.30 1.27",
    ("70B", "ours LoRA kext"): "1.04 1.03 1.03",
    ("1B", "PEFT fp32+ac QLoRA"): "3.49 2.20 1.81",
    ("8B", "PEFT fp32+ac QLoRA"): "2.51 1.68 1.43",
    ("8B", "ours QLoRA kext"): "1.54 1.19 1.09",
    ("70B", "ours QLoRA floor"): "1.44 1.12 1.03",
    ("8B", "PEFT fp32+ac DoRA"): "8.00 4.24 3.08",
    ("8B", "PEFT bf16 DoRA"): "3.90 2.37 1.90",
    ("8B", "ours DoRA"): "1.39 1.20 1.14",
    ("70B", "PEFT fp32+ac DoRA"): "7.19 3.27 2.20",
    ("1B", "ours DoRA"): "1.69 1.39 1.28",
    ("8B", "PEFT fp32+ac dropout"): "1.98 1.79 1.71",
    ("8B", "PEFT bf16 dropout"): "1.55 1.44 1.41",
    ("8B", "ours dropout"): "1.22 1.16 1.14",
}
OTHERS = {
    (A100, "8B", "PEFT fp32+ac LoRA"): "1.32 1.36 1.38",
    (A100, "1B", "ours LoRA kext"): "1.08 1.06 1.08",
    (A100, "8B", "ours DoRA"): "1.18 1.12 1.10",
    (RTX_4090, "8B", "PEFT bf16 LoRA"): "1.15 1.23 1.28",
    (RTX_4090, "1B", "PEFT fp32+ac QLoRA"): "2.26 1.64 1.60",
    (RTX_4090, "8B", "ours LoRA floor"): "1.02 1.01 1.01",
}
MILLISECONDS = {
    (H200, "1B"): "0.23 0.68 2.63",
    (H200, "8B"): "0.67 2.34 9.24",
    (H200, "70B"): "2.37 8.99 35.8",
    (A100, "8B"): "2.59 8.73 32.6",
    (RTX_4090, "8B"): "3.27 12.2 48.4",
}


def three(text):
    """(value, half a unit of its last digit) of each."""
    return [(float(part), 0.5 * 10 ** -len(part.partition(".")[2])) for part in text.split()]


@pytest.mark.parametrize(
    ("gpu", "model", "way", "published"),
    [(H200, *key, text) for key, text in H200_TAXES.items()] + [(*key, text) for key, text in OTHERS.items()],
)
def test_taxes(gpu, model, way, published):
    for tokens, (value, half) in zip(TOKENS, three(published), strict=True):
        assert tax(gpu, MODELS[model], tokens, way) == pytest.approx(value, abs=1.05 * half)


@pytest.mark.parametrize(("gpu", "model", "published"), [(*key, text) for key, text in MILLISECONDS.items()])
def test_base(gpu, model, published):
    for tokens, (value, half) in zip(TOKENS, three(published), strict=True):
        assert 1e3 * seconds(gpu, MODELS[model], tokens, "base") == pytest.approx(value, abs=1.05 * half)


def test_kernels():
    assert [round(2 * t * 4096 * 4096 / Cost(H200, t).gemm(4096, 4096) / 1e12) for t in TOKENS] == [
        657,
        772,
        785,
    ]
    assert [round(2 * t * 4096 * 1024 / Cost(H200, t).gemm(1024, 4096) / 1e12) for t in TOKENS] == [
        404,
        657,
        772,
    ]
    weights = MODELS["8B"].weights
    assert round(1e6 * Cost(H200, 1).dequant(weights)) == 144
    assert round(1e6 * Cost(H200, 1).dequant(weights, bitsandbytes=True)) == 291
    groups = MODELS["8B"].groups.values()
    norms = [
        Cost(H200, 1).peft_norms(*group, kind) for kind in ("fp32+ac DoRA", "bf16 DoRA") for group in groups
    ]
    assert round(1e6 * sum(norms[:4])) == 3204 and round(1e6 * sum(norms[4:])) == 1179
    assert round(1e6 * sum(Cost(H200, 1).dora_norms(*group) for group in groups)) == 151


def test_the_activation_adds_to_both_sides():
    shape = MODELS["8B"]
    eager = sum(nbytes for direction in ((4, 6), (6, 6, 6)) for nbytes in direction)
    for way in ("base", "PEFT bf16 LoRA", "ours LoRA linear"):
        added = seconds(H200, shape, 8192, way, glu=True) - seconds(H200, shape, 8192, way)
        assert added == pytest.approx(eager * 8192 * 14336 / (0.9 * 4.3e12) + 5 * 2e-6)
    assert tax(H200, shape, 8192, "ours LoRA kext", glu=True) < tax(H200, shape, 8192, "ours LoRA kext")


def test_chips_are_known_by_their_names():
    assert known("NVIDIA H200") is H200
    assert known("NVIDIA A100-SXM4-80GB") is A100
    assert known("NVIDIA GeForce RTX 4090") is RTX_4090
    assert known("NVIDIA H100 80GB HBM3") is None


def test_an_unknown_way_is_refused():
    for way in ("PEFT bf16 QLoRA", "ours LoRA", "ours LoRA magic", "theirs"):
        with pytest.raises(ValueError, match="no way"):
            tax(H200, MODELS["8B"], 512, way)
