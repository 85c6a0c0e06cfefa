"""What this GPU gives, and the assumptions of `bench.cost_model` one by one (`python -m bench._gpu_machine`).

Each question is asked of vendor kernels and of ours where it is about them; a row holds what was measured and
what the model takes for granted. The ceilings come first: the others are shares of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cost_model
from bench._bandwidth import Copy
from bench._cases import bnb_state, nf4, stored_bytes
from bench._stopwatch import Run, Stopwatch, stopwatch
from bench._stream import Row, Sink, serve
from bench._subjects import CONFIGS, FEATURES, Sizes, linear
from bench._timing import Rounds, interleave
from bench.cost_model import Cost, Gpu
from pyfastlora.ops import all_ops, dequant_4bit, lora_backward
from pyfastlora.ops._registry import problem_of

BF16 = torch.bfloat16


@dataclass(slots=True)
class Machine:
    """The device under question. tiny: sizes for a test of this program."""

    device: torch.device
    tiny: bool = False
    watch: Stopwatch = field(init=False)
    gpu: Gpu = field(init=False)  # what the model goes by here: its own table, or what is measured

    def __post_init__(self) -> None:
        self.watch = stopwatch(self.device)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.gpu = cost_model.known(name) or self.measured(name)

    def measured(self, name: str) -> Gpu:
        """The ceilings, taken now."""
        copy = Copy((1 << 20) if self.tiny else (1 << 30), self.device)
        n = self.size(8192)
        a, b = self.noise(n, n), self.noise(n, n)
        sms, cache = 1, 4 << 20
        if self.device.type == "cuda":
            chip = torch.cuda.get_device_properties(self.device)
            sms, cache = chip.multi_processor_count, chip.L2_cache_size
        flops = 2 * n**3 / self.seconds(lambda: a @ b)
        return Gpu(name, sms, flops, copy.traffic / self.seconds(copy), cache, self.in_cache(cache)[0])

    def in_cache(self, cache: float) -> tuple[float, float]:
        """Of a pass over what the one before left in the L2: (bytes a second, seconds to start and end)."""
        sizes, taken = [int(cache) // 32, int(cache) // 8], []
        for nbytes in sizes:
            x = self.noise(nbytes // 2)
            y = torch.empty_like(x)
            taken.append(self.seconds(lambda x=x, y=y: torch.neg(x, out=y), cold=False))
        if taken[1] <= taken[0]:  # too small for the clock
            return 2 * sizes[1] / taken[1], 0.0
        rate = 2 * (sizes[1] - sizes[0]) / (taken[1] - taken[0])
        return rate, taken[0] - 2 * sizes[0] / rate

    def size(self, full: int) -> int:
        """A width or a count of tokens."""
        return max(16, full // 64) if self.tiny else full

    @property
    def activations(self) -> list[tuple[int, int]]:
        """[T, width] in an 8B model, by size."""
        return [(self.size(t), self.size(n)) for t, n in ((2048, 4096), (8192, 4096), (8192, 14336))]

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(BF16)

    def turns(self, runs: Mapping[str, Run], *, cold: bool = True) -> Rounds:
        timed, seconds = self.watch.cold if cold else self.watch.busy, 0.02 if self.tiny else 0.3
        return interleave(runs, rounds=25, at_least=5, seconds=seconds, warmup=3, timed=timed)

    def seconds(self, run: Run, *, cold: bool = True) -> float:
        return self.turns({"run": run}, cold=cold).time("run").median

    def host_seconds(self, run: Run) -> float:
        """Until the call comes back."""
        rounds = 5 if self.tiny else 60
        return interleave({"run": run}, rounds=rounds, warmup=5, timed=self.watch.host).time("run").median


def row(question: str, case: str, value: float, unit: str, assumed: float | None = None) -> Row:
    rounded = [None if v is None else float(f"{v:.4g}") for v in (value, assumed)]
    return {"question": question, "case": case, "value": rounded[0], "unit": unit, "assumed": rounded[1]}


# ---- ceilings ---------------------------------------------------------------------------------------------


def ceilings(m: Machine) -> Iterator[Row]:
    """Copy, GEMM, a pass in the L2; what the model goes by here; which implementation of each op runs."""
    found = m.measured(m.gpu.name)
    for name, unit, value, assumed in (
        ("copy, read + written", "TB/s", found.copy, m.gpu.copy),
        (f"bfloat16 GEMM, {m.size(8192)} cubed", "TFLOP/s", found.flops, m.gpu.flops),
        ("a pass in the L2", "TB/s", found.l2_rate, m.gpu.l2_rate),
    ):
        yield row("ceiling", name, value / 1e12, unit, assumed / 1e12)
    start = m.in_cache(found.l2)[1]
    yield row("ceiling", "start and end of a pass", start * 1e6, "us", cost_model.START * 1e6)
    yield {"gpu": asdict(m.gpu)}
    yield {"implementations": {op.name: op.choose(problem_of(m.device, BF16)).name for op in all_ops()}}


# ---- questions --------------------------------------------------------------------------------------------


def launches(m: Machine) -> Iterator[Row]:
    """An empty kernel by itself, and one of many in a row."""
    x = m.noise(1)

    def many() -> None:
        for _ in range(64):
            x.neg_()

    yield row("empty launch", "alone", m.seconds(x.neg_, cold=False) * 1e6, "us", cost_model.SHORTEST * 1e6)
    yield row("empty launch", "in a row", m.seconds(many, cold=False) / 64 * 1e6, "us")
    yield row("empty launch", "the host's part", m.host_seconds(many) / 64 * 1e6, "us")


def k_step(m: Machine) -> Iterator[Row]:
    """One more main-loop step in K, and rows with a pitch for it, over packed rows."""
    k = m.size(4096)
    for tokens in (m.size(2048), m.size(8192)):
        for outer in (m.size(4096), m.size(14336)):
            x, w = m.noise(tokens, k + 64), m.noise(outer, k + 64)
            packed_x, packed_w = x[:, :k].contiguous(), w[:, :k].contiguous()

            def product(width: int, x: Tensor = x, w: Tensor = w) -> Run:
                return lambda: F.linear(x[:, :width], w[:, :width])

            longer = {f"K = {width}, pitch {k + 64}": width for width in (k, k + 16, k + 64)}
            runs = {"packed": lambda x=packed_x, w=packed_w: F.linear(x, w)}
            turns = m.turns(runs | {case: product(width) for case, width in longer.items()})
            for case, width in longer.items():
                assumed = 1 + cost_model.K_STEP / k * (width > k)
                ratio = turns.ratio(case, "packed").median
                yield row("one K step more", f"T = {tokens}, O = {outer}, {case}", ratio, "x", assumed)


def skinny(m: Machine) -> Iterator[Row]:
    """The vendor's rank-r products, as a share of the copy's rate."""
    for tokens, width in m.activations:
        x, y = m.noise(tokens, width), m.noise(tokens, width)
        for rank in (16, 64):
            s, factor = m.noise(tokens, rank), m.noise(rank, width)
            once = 2 * tokens * width
            products: tuple[tuple[str, int, Run], ...] = (
                (f"shrink, N = {rank}", once, lambda x=x, f=factor: x @ f.t()),
                (f"dA, M = {rank}", once, lambda x=x, s=s: s.t() @ x),
                (f"addmm_, K = {rank}", 2 * once, lambda y=y, s=s, f=factor: y.addmm_(s, f, alpha=1e-4)),
            )
            for name, moved, run in products:
                share = moved / m.gpu.copy / m.seconds(run)
                case = f"{name}, T = {tokens}, width {width}"
                yield row("skinny products, share of copy", case, share, "x", cost_model.REACHED)


def beta(m: Machine) -> Iterator[Row]:
    """What a GEMM with beta = 1 takes beyond one without, over the time of reading C."""
    k = m.size(4096)
    for tokens in (m.size(512), m.size(2048), m.size(8192)):
        x, w, c = m.noise(tokens, k), m.noise(k, k), m.noise(tokens, k)
        runs: dict[str, Run] = {
            "plain": lambda x=x, w=w, c=c: torch.mm(x, w, out=c),
            "added": lambda x=x, w=w, c=c: c.addmm_(x, w),
        }
        turns = m.turns(runs)
        more = turns.time("added").median - turns.time("plain").median
        exposed = more / (2 * tokens * k / m.gpu.copy)
        case = f"T = {tokens}, {k} x {k}"
        yield row("exposed share of a beta = 1 read", case, exposed, "x", cost_model.EXPOSED)


def dy_pass(m: Machine) -> Iterator[Row]:
    """dS = dy B and dB = dy^T S, in two vendor products and in one pass of our kernel, over a read of dy."""
    for tokens, outer in m.activations:
        dy = m.noise(tokens, outer)
        for rank in (16, 64):
            s, b = m.noise(tokens, rank), m.noise(outer, rank)
            wide = s.float()

            def vendor(dy: Tensor = dy, s: Tensor = s, b: Tensor = b) -> object:
                return dy @ b, dy.t() @ s

            def ours(dy: Tensor = dy, s: Tensor = wide, b: Tensor = b) -> object:
                return lora_backward(dy, b, s)

            turns = m.turns({"vendor": vendor, "ours": ours})
            once = 2 * tokens * outer / m.gpu.copy
            for name, passes in (("vendor", 2), ("ours", 1)):
                case = f"{name}, r = {rank}, T = {tokens}, O = {outer}"
                reads = turns.time(name).median / once
                yield row("dS and dB, over one read of dy", case, reads, "x", passes / cost_model.REACHED)


def small_passes(m: Machine) -> Iterator[Row]:
    """A pass over activations that the kernel before it wrote."""
    for tokens in (m.size(512), m.size(1024), m.size(2048)):
        x = m.noise(tokens, m.size(4096))
        y, moved = torch.empty_like(x), 2 * x.nbytes

        def there_and_back(x: Tensor = x, y: Tensor = y) -> None:
            torch.neg(x, out=y)
            torch.neg(y, out=x)

        rate = 2 * moved / m.seconds(there_and_back, cold=False)
        assumed = moved / Cost(m.gpu, 1).kernel(moved)
        case = f"T = {tokens}, {moved / 1e6:.1f} MB"
        yield row("a pass on what was just written", case, rate / 1e12, "TB/s", assumed / 1e12)


def dequantisation(m: Machine) -> Iterator[Row]:
    """A gate projection of an 8B, by bitsandbytes and by ours, as a share of the copy's rate."""
    w = nf4((m.size(14336), m.size(4096)), BF16)
    out = torch.empty(w.shape, dtype=BF16, device=m.device)
    moved = stored_bytes(w) + out.nbytes
    runs: dict[str, Run] = {"ours": lambda: dequant_4bit(w, out=out)}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        packed, state = w.packed.view(-1, 1), bnb_state(w)
        runs["bitsandbytes"] = lambda: bnb.dequantize_4bit(packed, state)
    turns = m.turns(runs)
    for name in runs:
        share = moved / m.gpu.copy / turns.time(name).median
        assumed = cost_model.REACHED if name == "ours" else cost_model.BNB
        yield row("NF4 to bfloat16, share of copy", f"{name}, {list(w.shape)}", share, "x", assumed)


def gemm_rates(m: Machine) -> Iterator[Row]:
    """Of the shapes that do not fill the chip, and of two that do."""
    for k, n in ((2048, 512), (4096, 1024), (4096, 4096), (4096, 14336)):
        for tokens in (512, 2048, 8192):
            t, i, o = m.size(tokens), m.size(k), m.size(n)
            x, w = m.noise(t, i), m.noise(o, i)
            flops = 2 * t * i * o
            taken = m.seconds(lambda x=x, w=w: F.linear(x, w))
            assumed = flops / Cost(m.gpu, t).gemm(o, i) / 1e12
            yield row("GEMM", f"T = {t}, {i} to {o}", flops / taken / 1e12, "TFLOP/s", assumed)


def hosts(m: Machine) -> Iterator[Row]:
    """What one adapted linear costs the host, forward and backward, on tensors too small to wait for."""
    for config in ("bf16+fp32 autocast", "bf16"):
        with m.device:
            subject = linear(FEATURES["LoRA"], CONFIGS[config], 16, Sizes(width=256))
        for who, run in subject.runs.items():
            taken = m.host_seconds(run) * 1e6
            yield row("host, one linear forward + backward", f"{who}, {config}", taken, "us")


QUESTIONS = (
    ceilings,
    launches,
    gemm_rates,
    skinny,
    dy_pass,
    beta,
    k_step,
    small_passes,
    dequantisation,
    hosts,
)


@click.command()
@click.option("--stream", type=click.Path(path_type=Path), required=True, help="Lines of bench._stream.")
@click.option("--until", type=float, default=math.inf)
@click.option("--skip", type=int, default=0)
@click.option("--tiny", is_flag=True, help="On the CPU, sizes for a test of this program.")
def main(stream: Path, until: float, skip: int, tiny: bool) -> None:
    """A step of `python -m bench.gpu`."""
    machine = Machine(torch.device("cpu" if tiny else "cuda"), tiny)
    names = {question.__name__: question for question in QUESTIONS}
    serve(list(names), lambda name: list(names[name](machine)), Sink(stream, until), skip)


if __name__ == "__main__":
    main()
