"""What the linears of a decoder layer should cost on a GPU, counted in bytes and flops.

Nothing here is timed. A kernel costs what the larger of its bytes and its flops takes at a GPU's ceilings,
kernels run one after the other, and the host keeps up. What follows is assumed, and measured by `bench.gpu`:

- GEMM: whole waves of CTA tiles (128 x 256 at the full rate, 128 x 128 at 0.9, 128 x 64 at 0.7), K split by
  1 to 8 with float32 partial sums through the L2; the best of these, K rounded up to 64, and 2 us more.
- A pass over memory reaches 90 % of a copy's rate, or of the L2's where its traffic fits in half of the L2
  and was written a moment ago; 2 us more, and never under 3.5 us.
- A rank-r kernel reaches half the tensor rate. Half of what a GEMM with beta = 1 reads of C is hidden.
- bitsandbytes unpacks NF4 in three launches at half the copy rate.

The base is seven frozen linears, forward and dx, with autograd's sums of the siblings' dx. PEFT's passes are
those of 0.21.2 as a dispatcher sees them, dropout as CUDA's two fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Gpu:
    """Ceilings: flops of a large bfloat16 GEMM; bytes read + written a second by a copy, and in the L2."""

    name: str
    sms: int
    flops: float
    copy: float
    l2: float
    l2_rate: float


# Of the H200, GEMM (8192 cubed, random data) and copy were measured; the others' are public figures, and
# every rate of an L2 is an assumption.
H200 = Gpu("H200", 132, 790e12, 4.3e12, 60e6, 6.5e12)
A100 = Gpu("A100", 108, 230e12, 1.7e12, 40e6, 3.5e12)
RTX_4090 = Gpu("4090", 128, 150e12, 0.9e12, 72e6, 4.0e12)


def known(device: str) -> Gpu | None:
    """The ceilings of "NVIDIA H200" or the like; None for a GPU without a table."""
    return next((gpu for gpu in (H200, A100, RTX_4090) if gpu.name in device.replace("-", " ").split()), None)


class Shape(NamedTuple):
    """Widths of a decoder layer."""

    hidden: int
    intermediate: int
    q: int
    kv: int

    @property
    def groups(self) -> dict[str, tuple[int, list[int]]]:
        """Projections that share an input: (width in, widths out)."""
        return {
            "qkv": (self.hidden, [self.q, self.kv, self.kv]),
            "o": (self.q, [self.hidden]),
            "gate_up": (self.hidden, [self.intermediate] * 2),
            "down": (self.intermediate, [self.hidden]),
        }

    @property
    def weights(self) -> int:
        """Elements of the seven matrices."""
        return sum(inner * sum(outers) for inner, outers in self.groups.values())


MODELS = {
    "1B": Shape(2048, 8192, 2048, 512),  # Llama-3.2-1B
    "8B": Shape(4096, 14336, 4096, 1024),  # Llama-3.1-8B
    "70B": Shape(8192, 28672, 8192, 1024),  # Llama-3.1-70B
}

REACHED, SKINNY, EXPOSED, BNB = 0.9, 0.5, 0.5, 0.5
START, SHORTEST = 2e-6, 3.5e-6
K_STEP = 64
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (128, 64, 0.7))  # rows, columns, relative rate
CODES = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a nested NF4 weight: nibble, scale, scale of scales
BNB_BYTES = 2.5 + (1 + 4 + 8 + 4) / 64  # scales decoded to float32, the offset added, read again


@dataclass(frozen=True, slots=True)
class Passes:
    """What PEFT adds around a base linear: bytes per element of each pass over x [T, I] and y [T, O], forward
    and backward; launches on tensors too small to count; passes of DoRA's norm over W and over the identity.
    """

    x: tuple[Sequence[int], Sequence[int]]
    y: tuple[Sequence[int], Sequence[int]]
    launches: tuple[int, int] = (0, 0)
    norm: tuple[Sequence[int], Sequence[int]] = ((), ())


_BACK_FP32, _BACK_BF16 = (2, 2, 6, 6, 6), (2, 2, 6)
PEFT = {
    "fp32+ac LoRA": Passes(((6, 6, 2), _BACK_FP32), ((2, 4, 6), (4, 2, 2)), (2, 2)),
    "bf16 LoRA": Passes(((2,), _BACK_BF16), ((2, 4, 6), (4, 2, 2))),
    "fp32+ac QLoRA": Passes(((2,), _BACK_BF16), ((4, 2, 4, 6), (4, 2, 2)), (2, 2)),
    "fp32+ac dropout": Passes(((6, 9, 6, 2), (*_BACK_FP32, 9)), ((2, 4, 6), (4, 2, 2)), (2, 2)),
    "bf16 dropout": Passes(((5, 2), (2, 2, 5, 6)), ((2, 4, 6), (4, 2, 2))),
    "fp32+ac DoRA": Passes(
        ((6, 6, 2), _BACK_FP32),
        ((2, 6, 6, 8, 12, 10, 6), (6, 6, 8, 8, 10, 4, 6, 8, 10, 4, 6, 6, 2, 2)),
        (4, 5),
        ((2, 6, 6, 8, 12, 4), (4, 6, 2)),
    ),
    "bf16 DoRA": Passes(
        ((2,), _BACK_BF16),
        ((2, 4, 4, 4, 6, 6), (4, 4, 6, 2, 4, 6, 2, 6, 2, 2)),
        (2, 2),
        ((2, 4, 6, 2), (2, 2)),
    ),
}
# The gated activation between gate/up and down: transformers' own operations, and one kernel each way.
EAGER_GLU, FUSED_GLU = ((4, 6), (6, 6, 6)), ((6,), (12,))
# Ours, each with what it adds to the one before: a node per linear; q/k/v and gate/up share shrink, dA and
# dx; dS and dB in one pass over dy; the cheapest of epilogue, expand first and K-extension; producers shrink,
# all at copy rate.
DESIGNS = ("linear", "grouped", "dual", "kext", "floor")
ANYWHERE = ("epilogue", "first", "copy")  # ways to add the adapter that ask nothing of who wrote x or dy


class Cost:
    """Seconds on `tokens` tokens, adapters of `rank`. reached: of a copy's rate, by a pass over memory."""

    def __init__(self, gpu: Gpu, tokens: int, rank: int = 16, reached: float = REACHED) -> None:
        self.gpu, self.tokens, self.rank, self.reached = gpu, tokens, rank, reached

    # ---- kernels ----

    def gemm(self, n: int, k: int) -> float:
        """[T, k] x [k, n] by the vendor."""
        gpu, m, k = self.gpu, self.tokens, math.ceil(k / K_STEP) * K_STEP
        # Of one SM, so that 8192 cubed, which is 2048 tiles, comes out at the ceiling with its last wave.
        rate = gpu.flops * math.ceil(2048 / gpu.sms) / 2048
        waves = math.inf
        for rows, cols, relative in TILES:
            tiles = math.ceil(m / rows) * math.ceil(n / cols)
            for split in (1, 2, 4, 8):
                partial = 8 * split * m * n / gpu.l2_rate if split > 1 else 0.0
                taken = math.ceil(tiles * split / gpu.sms) * 2 * rows * cols * k / split / (rate * relative)
                waves = min(waves, taken + partial)
        return max(waves, 2 * m * n * k / gpu.flops, 2 * (m * k + n * k + m * n) / gpu.copy) + START

    def kernel(self, nbytes: float, flops: float = 0.0, *, cold: bool = False) -> float:
        """A pass over memory. cold: its operands were written long ago, so no L2 holds them."""
        rate = self.gpu.copy if cold or nbytes > self.gpu.l2 / 2 else self.gpu.l2_rate
        return max(SHORTEST, START + max(nbytes / (self.reached * rate), flops / (SKINNY * self.gpu.flops)))

    def passes(self, per_element: Iterable[int], width: int) -> float:
        """Kernels that move so many bytes per element of [T, width], one each."""
        return sum(self.kernel(nbytes * self.tokens * width) for nbytes in per_element)

    def skinny(self, nbytes: int, width: int, ranks: int, *, cold: bool = False, products: int = 1) -> float:
        """A rank-r product over [T, width], `nbytes` per element."""
        flops = 2 * products * self.tokens * width * ranks
        return self.kernel(nbytes * self.tokens * width, flops, cold=cold)

    def dequant(self, weights: int, *, bitsandbytes: bool = False) -> float:
        """NF4 to bfloat16."""
        if bitsandbytes:
            return BNB_BYTES * weights / (BNB * self.gpu.copy) + 3 * SHORTEST
        return self.kernel((CODES + 2) * weights, cold=True)

    # ---- a group of projections: (width in, widths out), forward and backward together ----

    def base(self, inner: int, outers: Sequence[int]) -> float:
        return sum(self._frozen(inner, outers))

    def _frozen(self, inner: int, outers: Sequence[int]) -> tuple[float, float]:
        sums = self.passes([6] * (len(outers) - 1), inner)
        return sum(self.gemm(o, inner) for o in outers), sum(self.gemm(inner, o) for o in outers) + sums

    def peft(self, inner: int, outers: Sequence[int], kind: str) -> float:
        total, added = self.base(inner, outers), PEFT[kind]
        for o in outers:
            for x, y, launches in zip(added.x, added.y, added.launches, strict=True):
                total += self.passes(x, inner) + self.passes(y, o) + launches * SHORTEST
        return total + self.peft_norms(inner, outers, kind)

    def peft_norms(self, inner: int, outers: Sequence[int], kind: str) -> float:
        """DoRA's norms of a group the way PEFT takes them."""
        over_w, over_identity = PEFT[kind].norm
        sizes = [n * inner * o for o in outers for n in over_w]
        sizes += [n * inner * inner for n in over_identity] * len(outers)
        return sum(self.kernel(nbytes) for nbytes in sizes)

    def ours(self, inner: int, outers: Sequence[int], design: str, group: str = "") -> float:
        """LoRA, by one of `DESIGNS`."""
        if design == "linear" and len(outers) > 1:
            alone = sum(self.ours(inner, [o], design) for o in outers)
            return alone + self.passes([6] * (len(outers) - 1), inner)
        forward, backward = self._forwards(inner, outers), self._backwards(inner, outers)
        d_a = self.skinny(2, inner, len(outers) * self.rank, cold=True)
        if design not in ("kext", "floor"):
            d_b = 0.0 if design == "dual" else sum(self.skinny(2, o, self.rank) for o in outers)
            return forward["epilogue"] + backward["epilogue"] + d_a + d_b
        # Our GLU leaves room beside the input of down and the gradients of gate and up; in the floor it also
        # shrinks, takes dA of down along, and the norm does as much for q/k/v and gate/up.
        prepared = ("producer",) if design == "floor" else ("room",)
        own_x = group == "down" or (design == "floor" and group in ("qkv", "gate_up"))
        own_dy = group == "gate_up"
        cheapest = min(forward[way] for way in (*ANYWHERE, *prepared * own_x))
        cheapest += min(backward[way] for way in (*ANYWHERE, *prepared * own_dy))
        return cheapest + (0.0 if design == "floor" and group == "down" else d_a)

    def dora(self, inner: int, outers: Sequence[int]) -> float:
        """Ours: norms by the identity, z kept, dy scaled into a tensor of ours that leaves room."""
        forward, backward = self._forwards(inner, outers), self._backwards(inner, outers)
        scaled = forward["epilogue"] + sum(self.passes([6], o) - self.passes([4], o) for o in outers)
        extended = forward["copy"] + sum(self.passes([4], o) for o in outers)
        down = sum(self.skinny(6, o, self.rank, products=2) for o in outers) + SHORTEST + backward["producer"]
        d_a = self.skinny(2, inner, len(outers) * self.rank, cold=True)
        return self.dora_norms(inner, outers) + min(scaled, extended) + down + d_a

    def dora_norms(self, inner: int, outers: Sequence[int]) -> float:
        """Ours, one pass over W each and a launch for the rank-r part."""
        return sum(
            self.kernel(2 * inner * o, 2 * inner * o * self.rank, cold=True) + SHORTEST for o in outers
        )

    def dropout(self, inner: int, outers: Sequence[int]) -> float:
        """Ours on torch's own draw: a call and a byte mask per projection; no tail of dx behind a mask."""
        forward, backward = self._forwards(inner, outers), self._backwards(inner, outers)
        n = len(outers)
        drawn = min(forward[way] for way in ANYWHERE) + self.passes([5] * n + [2] * (n - 1), inner)
        masks = self.kernel(n * self.tokens * inner, cold=True) - START
        return drawn + backward["first"] + masks + n * self.skinny(3, inner, self.rank, cold=True)

    def _forwards(self, inner: int, outers: Sequence[int]) -> dict[str, float]:
        """A group's forward by the way the adapter reaches y."""
        t, ranks = self.tokens, len(outers) * self.rank
        plain = sum(self.gemm(o, inner) for o in outers)
        extended = sum(self.gemm(o, inner + ranks) for o in outers)
        shrink, shrink_and_copy = self.skinny(2, inner, ranks), self.skinny(4, inner, ranks)
        write, update = (sum(self.skinny(nbytes, o, self.rank) for o in outers) for nbytes in (2, 4))
        read_y = EXPOSED * 2 * t * sum(outers) / self.gpu.copy
        return {
            "epilogue": shrink + plain + update,
            "first": shrink + write + plain + read_y,
            "copy": shrink_and_copy + SHORTEST + extended,  # one launch puts every B beside its W
            "room": shrink + SHORTEST + extended,
            "producer": extended,
        }

    def _backwards(self, inner: int, outers: Sequence[int]) -> dict[str, float]:
        """A group's dx, dS and dB by the way the adapter reaches dx. dS and dB take one pass over dy."""
        t, n, thin = self.tokens, len(outers), min(outers)
        ranks = n * self.rank
        plain = sum(self.gemm(inner, o) for o in outers)
        dual = sum(self._dual(o) for o in outers)
        read_dx = EXPOSED * 2 * t * inner / self.gpu.copy
        # One GEMM carries the tails of all: the thinnest, or one over all dy side by side.
        tail = plain - self.gemm(inner, thin) + self.gemm(inner, thin + ranks) + (n - 1) * read_dx
        side_by_side = min(tail, self.gemm(inner, sum(outers) + ranks))
        return {
            "epilogue": dual + plain + (n - 1) * read_dx + self.skinny(4, inner, ranks),
            "first": dual + self.skinny(2, inner, ranks) + plain + n * read_dx,
            "copy": dual - self._dual(thin) + self._dual(thin, 4) + SHORTEST + tail,
            "room": dual + SHORTEST + side_by_side,
            "producer": side_by_side,
        }

    def _dual(self, outer: int, nbytes: int = 2) -> float:
        return self.skinny(nbytes, outer, self.rank, products=2)


def seconds(gpu: Gpu, shape: Shape, tokens: int, way: str, *, rank: int = 16, glu: bool = False) -> float:
    """Forward and backward of a layer's seven linears; glu: with the activation between gate/up and down.

    way: "base"; "PEFT fp32+ac LoRA" and the other keys of `PEFT`; or "ours", a feature (LoRA, QLoRA, DoRA,
    QDoRA, dropout) and for the first two one of `DESIGNS`, as in "ours QLoRA kext". Raises ValueError for
    another.
    """
    who, *words = way.split(" ", 1)
    kind = words[0] if words else ""
    feature, _, design = kind.partition(" ")
    cost = Cost(gpu, tokens, rank, 1.0 if design == "floor" else REACHED)
    each = shape.groups.items()
    if way == "base":
        total = sum(cost.base(*group) for _, group in each)
    elif who == "PEFT" and kind in PEFT:
        total = sum(cost.peft(*group, kind) for _, group in each)
        total += 2 * cost.dequant(shape.weights, bitsandbytes=True) * kind.endswith("QLoRA")
    elif who == "ours" and feature in ("LoRA", "QLoRA") and design in DESIGNS:
        total = sum(cost.ours(*group, design, name) for name, group in each)
        total += 2 * cost.dequant(shape.weights) * (feature == "QLoRA")
    elif who == "ours" and kind in ("DoRA", "QDoRA"):
        total = sum(cost.dora(*group) for _, group in each)
        total += 2 * cost.dequant(shape.weights) * (kind == "QDoRA")
    elif way == "ours dropout":
        total = sum(cost.dropout(*group) for _, group in each)
    else:
        raise ValueError(f"cost model: no way {way!r}; there are base, PEFT {', PEFT '.join(PEFT)}, and ours")
    if glu:
        passes = FUSED_GLU if design in ("kext", "floor") else EAGER_GLU
        total += sum(cost.passes(direction, shape.intermediate) for direction in passes)
    return total


def tax(gpu: Gpu, shape: Shape, tokens: int, way: str, *, rank: int = 16, glu: bool = False) -> float:
    """`seconds` over those of the frozen dense base."""
    base = seconds(gpu, shape, tokens, "base", glu=glu)
    return seconds(gpu, shape, tokens, way, rank=rank, glu=glu) / base
