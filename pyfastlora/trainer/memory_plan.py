"""How much memory a job needs, from its configuration alone, and what to change where that is too much.

What a step keeps alive is counted in a rehearsal, which runs it without values. Weights are counted as they
are held, optimizer states by formula, and an engine's shares are taken of each. Numbers are bytes, of one
process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.changes import Change, combined, join
from pyfastlora.trainer.config import Config
from pyfastlora.trainer.optimizer_memory import state_bytes, step_bytes
from pyfastlora.trainer.rehearsal import GRADIENTS, Batch, Peak, Rehearsal, bytes_of, packed_bytes
from pyfastlora.trainer.strategy import bucket_of
from pyfastlora.trainer.units import GiB, in_words

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

WEIGHTS, TRAINED, OPTIMIZER = "frozen weights", "trained weights", "optimizer states"
DEQUANTISED, ENGINE, STEP = "dequantised weights", "engine's buffers", "optimizer step"
#: Beside tensors, at the start of training: Python with its libraries (0.54 GiB on Linux with torch's CPU
#: build), or a CUDA context with the workspaces of its libraries, which nobody has measured here.
LIBRARIES = {"cpu": 0.6 * GiB, "cuda": 0.8 * GiB}
#: The allocator's gaps, as a share of what tensors take.
GAPS = {"cpu": 0.05, "cuda": 0.05}


@dataclass(frozen=True)
class Machine:
    """Where processes run: device type and how much memory there is, for each on GPUs, for all on a CPU."""

    device: str
    memory: int


@dataclass(frozen=True)
class Shares:
    """What an engine divides among its processes, and what it keeps in the machine's memory instead."""

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    offloads: frozenset[str] = frozenset()


#: By their names without `_offload`; others divide nothing.
STRATEGIES = {
    "single": Shares(),
    "ddp": Shares(),
    "zero1": Shares(optimizer=True),
    "zero2": Shares(optimizer=True, gradients=True),
    "zero3": Shares(optimizer=True, gradients=True, weights=True),
    "fsdp2": Shares(optimizer=True, gradients=True, weights=True),
}


def shares_of(strategy: str) -> Shares:
    """Of a preset, or of a name that DeepSpeed's own files gave: `zero2_offload`."""
    shares = STRATEGIES.get(strategy.removesuffix("_offload"), Shares())
    if not strategy.endswith("_offload"):
        return shares
    there = (WEIGHTS, TRAINED, OPTIMIZER) if shares.weights else (OPTIMIZER,)
    return dataclasses.replace(shares, offloads=frozenset(there))


@dataclass(frozen=True)
class Plan:
    """Bytes of one process by category, on its device at the fullest moment; offloaded ones are in `host`."""

    machine: Machine
    strategy: str
    processes: int
    batch: Batch
    phase: str  # of the fullest moment
    parts: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """What tensors take on the device of a process."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What has to be there, for the tensors and beside them: of a GPU, or of the machine."""
        device = self.machine.device
        one = round(self.total * (1 + GAPS[device]) + LIBRARIES[device])
        return one if device == "cuda" else self.processes * (one + sum(self.host.values()))

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.needed <= self.machine.memory

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "strategy": self.strategy,
            "processes": self.processes,
            "device": self.machine.device,
            "batch": dataclasses.asdict(self.batch),
            "fullest": self.phase,
            "bytes": self.parts,
            "bytes_offloaded": self.host,
            "total_bytes": self.total,
            "needed_bytes": self.needed,
            "memory_bytes": self.machine.memory,
            "fits": self.fits,
        }

    def lines(self) -> list[str]:
        """A readable table."""
        width = max(map(len, (*self.parts, *self.host, "in all")))
        rows = [f"{name:<{width}}  {in_words(n):>10}" for name, n in self.parts.items()]
        rows += [f"{'in all':<{width}}  {in_words(self.total):>10}  fullest in: {self.phase}"]
        rows += [
            f"{name:<{width}}  {in_words(n):>10}  in the machine's memory" for name, n in self.host.items()
        ]
        b, packed = self.batch, "packed " if self.batch.packed else ""
        each = f"each of {self.processes} processes, {self.strategy}" if self.processes > 1 else "one process"
        head = f"{each}; {b.rows} {packed}row{'s' * (b.rows != 1)} of {b.tokens} tokens"
        where = "the GPU has" if self.machine.device == "cuda" else "free on this machine"
        verdict = "it fits" if self.fits else "it does not fit"
        needed = f"needed with libraries and gaps: {in_words(self.needed)}"
        return [head, *rows, f"{needed}; {where}: {in_words(self.machine.memory)}: {verdict}"]


class Planner:
    """Plans of one job and of its variations; models without values are kept from one to the next.

    longest: the longest sample, where that is known (else sequence_len).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        machine: Machine,
        strategy: str = "single",
        processes: int = 1,
        longest: int | None = None,
    ) -> None:
        self._tokenizer, self._machine = tokenizer, machine
        self._strategy, self._processes, self._longest = strategy, processes, longest
        self._rehearsals: dict[Any, Rehearsal] = {}
        self._peaks: dict[Any, Peak] = {}

    def plan(self, config: Config, packed: bool | None = None) -> Plan:
        """Raises UserError where the model cannot be run without values. packed: where it is known."""
        model = self.model_of(config)
        batch = batch_of(config, self._longest, packed)
        accumulates = config.gradient_accumulation_steps > 1
        train = self._peak(model, batch, config.gradient_checkpointing, accumulates)
        peaks = {"training": train}
        evaluated = config.eval_batch_size or 0
        if (config.val_set_size or config.test_datasets) and evaluated > batch.rows:
            several = dataclasses.replace(batch, rows=evaluated, masked=not batch.packed)
            peaks["evaluation"] = self._peak(model, several, None, False)
        return self._assemble(config, peaks, batch)

    def _assemble(self, config: Config, peaks: dict[str, Peak], batch: Batch) -> Plan:
        model = self.model_of(config)
        return assemble(config, model, peaks, self._machine, self._strategy, self._processes, batch)

    def model_of(self, config: Config) -> Rehearsal:
        """The model of a configuration without values."""
        import torch

        from pyfastlora.trainer.precision import resolve_precision

        precision = resolve_precision(config, torch.device(self._machine.device))
        key = (config.adapter, config.bits, precision)
        if key not in self._rehearsals:
            self._rehearsals[key] = Rehearsal(config, precision, self._tokenizer)
        return self._rehearsals[key]

    def fitting(self, config: Config, most: int = 1) -> list[tuple[Change, Plan]]:
        """The cheapest changes that make it fit, in order of what they cost; at most so many."""
        found: list[tuple[Change, Plan]] = []
        for changes in combined(config):
            if len(found) == most:
                break
            if not self._fits(config, changes):
                continue
            for change in changes[-2::-1]:  # what was not needed; the dearest goes first
                fewer = [c for c in changes if c is not change]
                if self._fits(config, fewer):
                    changes = fewer
            joined = join(changes)
            if not any(other.keys.items() <= joined.keys.items() for other, _ in found):
                found.append((joined, self.plan(joined.of(config))))
        return found

    def _fits(self, config: Config, changes: Sequence[Change]) -> bool:
        changed = join(changes).of(config)
        # what lasts is known at once, and is often too much already
        lasting = self._assemble(changed, {}, batch_of(changed))
        return lasting.fits and self.plan(changed).fits

    def _peak(self, model: Rehearsal, batch: Batch, checkpointing: bool | None, accumulates: bool) -> Peak:
        key = (id(model), batch, checkpointing, accumulates)
        if key not in self._peaks:
            self._peaks[key] = (
                model.evaluate(batch)
                if checkpointing is None
                else model.train(batch, accumulates, checkpointing)
            )
        return self._peaks[key]


def batch_of(config: Config, longest: int | None = None, packed: bool | None = None) -> Batch:
    """The fullest batch: of the longest samples, or of full rows; `auto` packs."""
    packs = bool(config.sample_packing) if packed is None else packed
    full = packs or config.pad_to_sequence_len or longest is None
    tokens = config.sequence_len if full else min(longest or 0, config.sequence_len)
    flash = (config.attn_implementation or "").startswith(("flash", "flex"))
    rows = config.micro_batch_size
    masked = not flash and not packs and (rows > 1 or config.pad_to_sequence_len)
    return Batch(rows, tokens, packs and not flash, masked)


def assemble(
    config: Config,
    model: Rehearsal,
    peaks: dict[str, Peak],
    machine: Machine,
    strategy: str,
    processes: int,
    batch: Batch,
) -> Plan:
    """The plan of a job of which the passes were rehearsed."""
    shares, trained = shares_of(strategy), model.trained

    def share(bytes_: int, divided: bool) -> int:
        return -(-bytes_ // processes) if divided else bytes_

    quantised = sum(_held(config, w) for w in model.quantised)
    # ZeRO-3 divides weights before they are quantised, and bitsandbytes' are not divided again
    split = shares.weights and not (strategy.startswith("zero3") and quantised)
    gradients = share(bytes_of(trained), shares.gradients)
    lasting = {
        WEIGHTS: share(quantised, split) + share(bytes_of(model.frozen), shares.weights),
        TRAINED: share(bytes_of(trained), shares.weights),
        OPTIMIZER: share(state_bytes(config.optimizer, trained), shares.optimizer),
        DEQUANTISED: _dequantised(config, model, machine),
        ENGINE: _buffers(config, strategy, processes, machine, model),
    }
    host = {name: lasting.pop(name) for name in list(lasting) if name in shares.offloads}
    moments = {name: _shared(peak.kinds, gradients) for name, peak in peaks.items()}
    of_step = share(step_bytes(config.optimizer, trained, machine.device == "cuda"), shares.optimizer)
    moments[STEP] = {GRADIENTS: gradients, STEP: of_step}
    phase = max(moments, key=lambda name: sum(moments[name].values()))
    names = {"training": "forward and backward", "evaluation": "evaluation", STEP: STEP}
    parts = {name: n for name, n in (lasting | moments[phase]).items() if n}
    host = {name: n for name, n in host.items() if n}
    return Plan(machine, strategy, processes, batch, names[phase], parts, host)


def _held(config: Config, weight: Tensor) -> int:
    nested = config.bnb_config_kwargs.bnb_4bit_use_double_quant
    return packed_bytes(weight.shape, config.bits or 4, nested=nested)


def _shared(kinds: dict[str, int], gradients: int) -> dict[str, int]:
    """An engine that divides gradients lets the rest of each go as soon as it is summed."""
    return {name: min(n, gradients) if name == GRADIENTS else n for name, n in kinds.items()}


def _dequantised(config: Config, model: Rehearsal, machine: Machine) -> int:
    """Where products go through a dense copy: one of the largest weight, in the dtype that is multiplied.

    Our CPU kernels decode a panel at a time. On a GPU a checkpointed layer keeps its copies for its backward.
    """
    from pyfastlora.ops._panels import PANEL_BYTES

    if not model.quantised:
        return 0
    dtype = model.precision.autocast or model.precision.base
    copies = {id(w): w.numel() * dtype.itemsize for w in model.quantised}
    largest = max(copies.values())
    if not config.fastlora:
        return largest
    if machine.device == "cpu":
        return min(largest, PANEL_BYTES)
    if not config.gradient_checkpointing:
        return largest
    return largest + sum(copies.get(id(w), 0) for w in model.largest_block)


def _buffers(config: Config, strategy: str, processes: int, machine: Machine, model: Rehearsal) -> int:
    """Gradients in flight, and the layers that are whole at the moment: one in use, one on its way."""
    whole_layers = 2 * bytes_of(model.largest_block)
    if strategy.startswith("zero"):
        two = machine.device == "cuda" and not strategy.startswith("zero3")  # one fills as one is sent
        buckets = bucket_of(config) * model.trained[0].element_size() * (1 + two)
        return buckets + (whole_layers if strategy.startswith("zero3") else 0)
    if processes == 1:
        return 0
    return whole_layers if strategy.startswith("fsdp2") else bytes_of(model.trained)
