"""The dispatcher: which implementation of an op runs, and why the others do not.

An `Op` holds its implementations in order of preference. For a `Problem` (device, arch, dtype) the first one
without an objection is taken; the choice is made once per problem and cached, so a call costs a dictionary
look-up. A requested backend (environment variable FASTLORA_BACKEND, or `backend(...)`) is taken or refused
with every candidate's reason; it never becomes another one silently.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pyfastlora.ops import _native, _native_gpu

logger = logging.getLogger("pyfastlora")

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("gpu", "triton", "cpu", "reference")
FLOATS = ("float16", "bfloat16", "float32")


class BackendError(RuntimeError):
    """A requested backend cannot take the problem. The message lists every candidate with its reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What an implementation may object to: `device` "cpu", "cuda", ..; `arch` "avx512", "sm_90", ..; `dtype`
    "bfloat16".
    """

    device: str
    arch: str
    dtype: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.device, self.arch, self.dtype) if part)


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op. `why_not(problem)` is None, or a fragment that reads after the name: "needs a
    GPU".
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None]


class Op:
    """An op and its implementations, best first. The last one, `reference`, takes everything."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = implementations
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        _ops[name] = self

    def pick(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """The implementation for problems on `tensor`'s device, in `dtype` (default: the tensor's)."""
        key = (tensor.device, dtype or tensor.dtype, _requests.get(self.name), _requests.get("*"))
        run = self._chosen.get(key)
        if run is None:
            chosen = _chosen_name(self.name, tensor.device, dtype or tensor.dtype)
            run = next(i.run for i in self.implementations if i.name == chosen)
            if not torch.compiler.is_compiling():  # a traced region may change nothing outside itself
                self._chosen[key] = run
        return run

    def choose(self, problem: Problem) -> Implementation:
        """The implementation that takes `problem` under the requests in force."""
        wanted = _requests.get(self.name) or _requests.get("*")
        if wanted is not None:
            for implementation in self.implementations:
                if implementation.name == wanted and implementation.why_not(problem) is None:
                    return implementation
            raise BackendError(self._refusal(wanted, problem))
        for implementation in self.implementations:
            reason = implementation.why_not(problem)
            if reason is None:
                logger.info("%s runs on `%s` for %s", self.name, implementation.name, problem)
                return implementation
            logger.debug("%s: `%s` %s", self.name, implementation.name, reason)
        raise BackendError(f"{self.name}: no implementation takes {problem}")

    def candidates(self, problem: Problem) -> list[tuple[str, str | None]]:
        """(name, objection or None) of every implementation, in order of preference."""
        return [
            (implementation.name, implementation.why_not(problem)) for implementation in self.implementations
        ]

    def _refusal(self, wanted: str, problem: Problem) -> str:
        lines = [f"{self.name}: `{wanted}` was requested and cannot take {problem}:"]
        names = [name for name, _ in self.candidates(problem)]
        if wanted not in names:
            lines.append(f"  {wanted:<10} has no implementation of this op")
        for name, reason in self.candidates(problem):
            lines.append(f"  {name:<10} {reason or f'can: FASTLORA_BACKEND={self.name}={name}'}")
        return "\n".join(lines)


def problem_of(device: torch.device, dtype: torch.dtype) -> Problem:
    """The problem that a call in `dtype` on `device` poses."""
    return Problem(device.type, arch_of(device), str(dtype).removeprefix("torch."))


def _constant_when_compiling(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result, which cannot be called here: it imports torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiling
def _chosen_name(op: str, device: torch.device, dtype: torch.dtype) -> str:
    # Constant for torch.compile, which cannot trace the loading of a library.
    return _ops[op].choose(problem_of(device, dtype)).name


@_constant_when_compiling
def arch_of(device: torch.device) -> str:
    """Instruction set of a CPU ("avx512"), compute capability ("sm_90") or gfx name of a GPU, else ""."""
    if device.type == "cpu":
        return _native.cpu_level()
    if device.type == "cuda":
        return _native_gpu.arch_of(device)
    return ""


def why_not_cpu(problem: Problem) -> str | None:
    """Objections of the compiled CPU kernels, common to every op."""
    if problem.device != "cpu":
        return f"needs CPU tensors; these are on {problem.device}"
    if problem.dtype not in FLOATS:
        return f"has {', '.join(FLOATS)}; this is {problem.dtype}"
    return _native.why_not()


def why_not_gpu(problem: Problem) -> str | None:
    """Objections of the compiled CUDA and HIP kernels, common to every op."""
    if problem.device != "cuda":
        return f"needs GPU tensors; these are on {problem.device}"
    if problem.dtype not in FLOATS:
        return f"has {', '.join(FLOATS)}; this is {problem.dtype}"
    return _native_gpu.why_not(problem.arch)


def always(problem: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def all_ops() -> tuple[Op, ...]:
    """Every op of the library, in the order of its definition."""
    import pyfastlora.ops  # noqa: F401  (defines them)

    return tuple(_ops.values())


@contextlib.contextmanager
def backend(spec: str) -> Iterator[None]:
    """Request backends for the calls inside: "reference", or per op "glu=cpu,dequant_4bit=reference".

    "auto" lifts the requests in force. Process-wide, because autograd runs backward passes on threads of its
    own.
    """
    with requests(parse_requests(spec)):
        yield


def requests_in_force() -> dict[str, str]:
    """The requests that a call made now would obey, for a backward pass to obey them too."""
    return _requests


class requests:  # noqa: N801  (a context manager, used like a function)
    """Put requests in force for the calls inside."""

    def __init__(self, requested: dict[str, str]) -> None:
        self._requested = requested

    def __enter__(self) -> None:
        global _requests
        self._before, _requests = _requests, self._requested

    def __exit__(self, *_: object) -> None:
        global _requests
        _requests = self._before


def parse_requests(spec: str) -> dict[str, str]:
    """{"*" or op name: backend} from "cpu" or "glu=cpu,dequant_4bit=reference"; raises ValueError.

    A stem stands for all of its ops: "glu" for glu_forward and glu_backward.
    """
    requests: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        op, _, name = item.rpartition("=")
        if name == "auto":
            continue
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r} in {spec!r}: choose one of auto, {', '.join(BACKENDS)}")
        named = [op] if op in _ops else [each for each in _ops if each.startswith(f"{op}_")]
        if op and not named:
            raise ValueError(f"backend {spec!r}: no op named {op}; there are {', '.join(_ops)}")
        requests.update(dict.fromkeys(named if op else ["*"], name))
    return requests


def obey_environment() -> None:
    """Put the requests of FASTLORA_BACKEND in force, once all ops are there; raises ValueError."""
    global _requests
    _requests = parse_requests(os.environ.get("FASTLORA_BACKEND", ""))


_ops: dict[str, Op] = {}
_requests: dict[str, str] = {}
