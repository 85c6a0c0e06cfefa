"""How the Triton kernels are launched: a table in the package, overlaid by that of `fastlora tune`.

    {"format": 2, "<op>": {"<arch>": {"<dtype>": {"<bounds>": {"BLOCK_T": 64, "num_warps": 4, ..}}}}}

The user's is one of these tables per version of this package, {"format": 2, "<version>": {"<op>": ..}}: what
another version found was found for other kernels. An entry whose settings are not those that the kernel takes
today is left out as well; either is said once.

arch is "sm_90" or "gfx942", else "cuda" or "hip", else "*"; dtype that of the activations, or "*"; bounds the
largest sizes that an entry is for, "512,16" or "*": powers of two, of those sizes that the op is launched by.
The most particular entry is taken, of the user's table first. `programs`, in an entry, is how many of them
fill the chip. Nothing is ever timed here.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import pyfastlora
from pyfastlora import _cache

logger = logging.getLogger("pyfastlora")

FORMAT = 2
SHIPPED = Path(__file__).with_name("tuning.json")
FILE = "tuning.json"  # in the cache

Entry = dict[str, int]
Table = dict[str, dict[str, dict[str, dict[str, Entry]]]]
OPTIONAL = {"num_warps", "num_stages"}  # Triton's own settings, which have defaults

_found: dict[tuple[Any, ...], tuple[tuple[tuple[str, int], ...], int]] = {}
_tables: list[Table] = []
_forced: dict[str, Entry] = {}


def config(op: str, tensor: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> tuple[Entry, int]:
    """(what the kernels of `op` are launched with, how many programs fill the chip) on the tensor's device.

    dtype: default the tensor's. The entry is the caller's to change.
    """
    meta, programs = _look_up(op, tensor.device, dtype or tensor.dtype, *[bucket(size) for size in sizes])
    return dict(meta), programs


def bucket(size: int) -> int:
    """The power of two, 16 at least, that `size` counts as."""
    bound = 16
    while bound < size:
        bound *= 2
    return bound


def fit(size: int, most: int) -> int:
    """The block that covers `size`: a power of two from 16, the least that matrix units take, to `most`."""
    return min(bucket(size), most)


def entry(op: str, arch: str, dtype: str, *sizes: int) -> Entry:
    """The most particular entry of the tables in force. Raises KeyError where there is none."""
    family = "hip" if arch.startswith("gfx") else "cuda" if arch else "*"
    for table in _tables or _load():
        by_arch = table.get(op, {})
        # By dtype first: a block of float32 is twice as large, whatever the chip.
        for key, of in itertools.product((dtype, "*"), (arch, family, "*")):
            fitting = {}
            for text, found in by_arch.get(of, {}).get(key, {}).items():
                bounds = [math.inf if part == "*" else int(part) for part in text.split(",")]
                bounds += [math.inf] * (len(sizes) - len(bounds))
                if all(size <= bound for size, bound in zip(sizes, bounds, strict=False)):
                    fitting[tuple(bounds)] = found
            if fitting:
                return fitting[min(fitting)]
    raise KeyError(f"{op}: no configuration for {arch}, {dtype}")


def user_tables() -> tuple[Path, dict[str, Table]] | None:
    """What `fastlora tune` wrote, by versions of this package, and where it is."""
    for directory in _cache.cache_dirs():
        path = directory / FILE
        if not path.is_file() or _cache.distrust(directory):
            continue
        try:
            table = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            _warn(f"{path} cannot be read ({error}); the shipped configurations run")
            continue
        if isinstance(table, dict) and table.pop("format", None) == FORMAT:
            return path, table
        _warn(f"{path} is of another version; run `fastlora tune` again")
    return None


@functools.cache  # once: tables are read again whenever something is tuned
def _warn(sentence: str) -> None:
    logger.warning("pyfastlora: %s", sentence)


def arch_of(device: torch.device) -> str:
    """The arch that Triton compiles for here, "sm_90" or "gfx942"; "" in its interpreter."""
    if triton.knobs.runtime.interpret:
        return ""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def asked() -> list[tuple[str, str, tuple[int, ...]]]:
    """(op, dtype, sizes as buckets) of every configuration looked up since the last `forget`."""
    return [(op, _name(dtype), sizes) for op, _, dtype, sizes in _found]


def force(configs: dict[str, Entry]) -> None:
    """Launch these ops with these configurations, whatever the tables say; {} ends it."""
    _forced.clear()
    _forced.update(configs)
    forget()


def forget() -> None:
    """Look everything up again: a table has changed, or the device behind an index."""
    _found.clear()
    _tables.clear()


def _look_up(
    op: str, device: torch.device, dtype: torch.dtype, *sizes: int
) -> tuple[tuple[tuple[str, int], ...], int]:
    key = (op, device, dtype, sizes)
    found = _found.get(key)
    if found is None:
        meta = dict(_forced.get(op) or entry(op, arch_of(device), _name(dtype), *sizes))
        programs = meta.pop("programs", 1)
        found = _found[key] = (tuple(meta.items()), programs)
    return found


# torch.compiler.assume_constant_result: torch.compile cannot trace the reading of a file.
_look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> list[Table]:
    shipped = json.loads(SHIPPED.read_text())
    del shipped["format"]
    if mine := user_tables():
        path, by_version = mine
        if pyfastlora.__version__ in by_version:
            _tables.append(_usable(by_version[pyfastlora.__version__], shipped, path))
        elif by_version:
            found = f"{path} was written by {', '.join(by_version)}, and this is {pyfastlora.__version__}"
            _warn(f"{found}: the shipped configurations run; run `fastlora tune` again")
    _tables.append(shipped)
    return _tables


def _usable(table: Table, shipped: Table, path: Path) -> Table:
    """The entries of the user's table with the settings that the shipped ones of their op have."""
    usable: Table = {}
    for op, by_arch in table.items():
        needed = {frozenset(found.keys() - OPTIONAL) for *_, found in _entries(shipped.get(op, {}))}
        for arch, dtype, bounds, found in _entries(by_arch):
            if found.keys() - OPTIONAL in needed and all(type(value) is int for value in found.values()):
                usable.setdefault(op, {}).setdefault(arch, {}).setdefault(dtype, {})[bounds] = found
            else:
                _warn(f"{path} has other settings for {op} than its kernel; run `fastlora tune` again")
    return usable


def _entries(
    by_arch: dict[str, dict[str, dict[str, Entry]]],
) -> Iterator[tuple[str, str, str, Entry]]:
    for arch, by_dtype in by_arch.items():
        for dtype, by_bounds in by_dtype.items():
            for bounds, found in by_bounds.items():
                yield arch, dtype, bounds, found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
