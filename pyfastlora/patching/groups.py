"""Adapted linears that are fed one tensor run as one node: q, k and v, gate and up, or any other siblings.

Nobody tells which. The linears of one parent are watched for one forward of that parent, once in training
and once in evaluation: those called with the same tensor object, unchanged and with no random number drawn
since, become a group. From then on the first member of a group computes for all, and each of the others
returns what is kept for it if it is called, in the same forward of the parent, with that very tensor,
unchanged, and is then the projection it was computed as: the same parameters, unchanged, scaling and dropout,
and no condition against it. (A write through `.data` in between does not show.) A call that comes otherwise
is computed on its own and ends the group for good; only time is lost. What nobody came for is dropped when
the parent's forward ends, also where it ends by raising.

A recomputed checkpoint has to save what its forward saved. So groups begin and end only while no checkpointed
forward can still be run again.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyfastlora.fused.projection import Projection

Groups = list[tuple[int, ...]]


@dataclass(slots=True)
class Kept:
    """The output of one member, and what it was computed as."""

    output: Tensor
    x: Tensor
    projection: Projection
    state: tuple[Any, ...]


@dataclass(slots=True)
class Run:
    """Members that were called with one tensor in the forward that is watched."""

    x: weakref.ref[Tensor]
    version: int | None
    members: list[int]
    drawn: Tensor | None = None  # state of the generator when the latest of them returned


@dataclass(slots=True)
class Siblings:
    """The patched linears of one parent, and which of them form groups."""

    names: tuple[str, ...]  # as children of their parent
    members: tuple[weakref.ref[nn.Module], ...]
    learned: dict[bool, Groups] = field(default_factory=dict)  # by the parent's mode, training or not
    ended: str = ""  # why they were given up
    plans: dict[bool, Groups] = field(default_factory=dict)  # what is learned and in force
    #: Nodes of checkpointed forwards.
    waiting: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    # of the parent's forward that is running:
    thread: int | None = None  # whose it is
    plan: Groups = field(default_factory=list)
    runs: list[Run] | None = None  # while it is watched
    run: Run | None = None  # the latest call's
    kept: dict[int, Kept] = field(default_factory=dict)

    def begin(self, parent: nn.Module) -> None:
        """The parent's forward begins.

        From scratch, whatever is left of another: one that was interrupted, or that calls itself.
        """
        self.kept, self.runs, self.run = {}, None, None
        if torch.compiler.is_compiling():  # in a graph: with the groups that are known by then
            self.thread, self.plan = 0, self.plans.get(parent.training, [])
            return
        children = parent.__dict__["_modules"]
        if any(children.get(name) is not ref() for name, ref in zip(self.names, self.members, strict=True)):
            self.thread, self.plan = None, []
            return forget(parent)  # merged, or unloaded
        if not _in_backward():
            if not any(not getattr(node, "run_back", False) for node in self.waiting):
                self.plans = {} if self.ended else dict(self.learned)
            if not self.ended and parent.training not in self.learned:
                self.runs = []
        self.thread, self.plan = threading.get_ident(), self.plans.get(parent.training, [])

    def end(self, parent: nn.Module, whole: bool) -> None:
        """The parent's forward ends; `whole`: not by raising, as a recomputation does once it has enough."""
        if self.kept and whole:
            names = ", ".join(self.names[i] for i in self.kept)
            self.ended = f"grouped no more: {names} did not come for x"
        if self.runs and whole:
            self.learned[parent.training] = [tuple(run.members) for run in self.runs if len(run.members) > 1]
        self.kept, self.runs, self.run, self.thread = {}, None, None, None

    def enter(self, member: int, x: Tensor, found: Projection | str) -> Tensor | None:
        """What is kept for a member that is called with x and reads as `found`; None: it has to compute.

        Calls begin here.
        """
        if not self._runs_here():
            return None
        if self.runs is not None:
            self._see(self.runs, member, x)
        kept = self.kept.pop(member, None)
        if kept is None:
            return None
        same = kept.x is x and not isinstance(found, str) and found.is_same(kept.projection)
        if same and kept.state == _state(x, kept.projection):
            return kept.output
        if isinstance(found, str):
            why = found
        else:
            changed = "changed after it was computed with the others"
            why = changed if kept.x is x else "was called with another tensor"
        self.ended = f"grouped no more: {self.names[member]} {why}"
        return None

    def leave(self, x: Tensor, y: Tensor | None) -> None:
        """Called by a member that has computed y, or None: by PEFT's forward."""
        if torch.compiler.is_compiling() or not self._runs_here():
            return
        if self.run is not None:
            self.run.drawn = _generator_state(x)
        if y is not None and y.grad_fn is not None and _checkpointing():
            self.waiting.add(y.grad_fn)

    def led_by(self, member: int, x: Tensor) -> tuple[int, ...]:
        """The members of the group that this one computes for, itself first; () if it leads none."""
        if not self._runs_here() or _unversioned(x):
            return ()
        return next((group for group in self.plan if group[0] == member), ())

    def keep(
        self, x: Tensor, members: Sequence[int], projections: Sequence[Projection], outputs: Sequence[Tensor]
    ) -> None:
        """What was computed with x for these members, as these projections."""
        for member, projection, output in zip(members, projections, outputs, strict=True):
            self.kept[member] = Kept(output, x, projection, _state(x, projection))

    def group_of(self, member: int) -> tuple[str, ...]:
        """The names of the group that a member is in, of training's if it is known; () if it is in none."""
        groups = [] if self.ended else self.learned.get(True, self.learned.get(False, []))
        return next((tuple(self.names[i] for i in group) for group in groups if member in group), ())

    def _runs_here(self) -> bool:
        """Whether a forward of the parent runs in this thread."""
        return self.thread == (0 if torch.compiler.is_compiling() else threading.get_ident())

    def _see(self, runs: list[Run], member: int, x: Tensor) -> None:
        version, drawn = _version(x), _generator_state(x)
        for run in runs:
            same = run.x() is x and run.version == version and not _unversioned(x)
            if same and member not in run.members and run.drawn is not None and torch.equal(run.drawn, drawn):
                run.members.append(member)
                self.run = run
                return
        self.run = Run(weakref.ref(x), version, [member])
        runs.append(self.run)


@dataclass(slots=True)
class Scope:
    """A hook of the parent that tells its siblings when a forward of it begins, or ends."""

    siblings: Siblings | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return type(self)(None)  # a copy's siblings are not these; patching the copy finds them

    def __reduce__(self) -> Any:
        return type(self), (None,)


class Begin(Scope):
    """Its forward pre-hook."""

    def __call__(self, parent: nn.Module, args: Any) -> None:
        if self.siblings is not None:
            self.siblings.begin(parent)


class End(Scope):
    """Its forward hook, called also where the forward raised."""

    def __call__(self, parent: nn.Module, args: Any, result: Any) -> None:
        if self.siblings is not None:
            # torch calls it with None while it handles what the forward raised
            self.siblings.end(parent, whole=result is not None or sys.exc_info()[0] is None)


def watch(parent: nn.Module, siblings: Siblings) -> None:
    """Let the siblings know of the parent's forwards."""
    forget(parent)
    parent.register_forward_pre_hook(Begin(siblings))
    parent.register_forward_hook(End(siblings), always_call=True)


def forget(parent: nn.Module) -> None:
    """Take the hooks of `watch` off again."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Scope)]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def _unversioned(x: Tensor) -> bool:
    """Whether a write to x leaves no trace: an inference tensor."""
    return not torch.compiler.is_compiling() and x.is_inference()


def _version(x: Tensor) -> int | None:
    # In a graph the watched forward has to do: versions are not known while it is traced.
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _state(x: Tensor, projection: Projection) -> tuple[Any, ...]:
    """What has to be the same when a member comes for what was computed for it."""
    tensors = (x, *projection.parameters)
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    flags = tuple(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), autocast, flags
    versions = tuple(None if t is None else _version(t) for t in tensors)
    return torch.is_grad_enabled(), autocast, flags, versions, torch.is_inference_mode_enabled()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _checkpointing() -> bool:
    """Whether the tensors saved now are dropped, to be made again: torch.utils.checkpoint, not reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _generator_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()
