"""Patches every LoRA model when PEFT makes it, in trainers that one cannot edit.

    import pyfastlora.auto                                     # anywhere before the model is made
    python -m pyfastlora.auto -m axolotl.cli.train cfg.yaml    # or in front of a module or a script
    accelerate launch -m pyfastlora.auto train.py              # after what starts the processes

PEFT puts every adapter into a model by one method, `BaseTuner.inject_adapter`: get_peft_model,
from_pretrained, load_adapter, add_adapter, inject_adapter_in_model and transformers' own `add_adapter` all
end there. That method is wrapped, so it does not matter which of them a trainer imported before, or under
which name. Classes of models stay as they are. As long as PEFT is not imported, nothing else is: a trainer
may have settings to make before it imports torch. FASTLORA_AUTO=0 makes the import do nothing.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_HOME = "peft.tuners.tuners_utils"


def enable() -> None:
    """Patch the models that PEFT makes from here on. Importing this module calls it."""
    if os.environ.get("FASTLORA_AUTO") == "0" or _seam.original is not None or _finder in sys.meta_path:
        return
    home = sys.modules.get(_HOME)
    if hasattr(home, "BaseTuner"):
        _seam.wrap(home)
    else:
        sys.meta_path.insert(0, _finder)


def disable() -> None:
    """Leave the models that PEFT makes from here on alone; `pyfastlora.unpatch` undoes those already made."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _seam.unwrap()


class _Seam:
    """`BaseTuner.inject_adapter`, while it is wrapped."""

    def __init__(self) -> None:
        self.tuner: Any = None
        self.original: Callable[..., Any] | None = None
        self.announced = False

    def wrap(self, home: Any) -> None:
        self.tuner, self.original = home.BaseTuner, home.BaseTuner.inject_adapter
        original = self.original

        @functools.wraps(original)
        def inject_adapter(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(tuner, model, *args, **kwargs)
            if self.original is original:
                self.patch(model)
            return result

        self.tuner.inject_adapter = inject_adapter

    def unwrap(self) -> None:
        # a wrapper around ours stays, and ours does nothing from here on
        if self.original is not None and self._is_ours(self.tuner.inject_adapter):
            self.tuner.inject_adapter = self.original
        self.original = None

    def patch(self, model: Any) -> None:
        from pyfastlora.patching import patch

        report = patch(model)
        if report.total and not self.announced:
            self.announced = True
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"pyfastlora.auto: {report.summary()}; pyfastlora.report(model) says which and why not, "
                    "FASTLORA_AUTO=0 turns this off",
                    file=sys.stderr,
                )

    def _is_ours(self, function: Any) -> bool:
        return getattr(function, "__wrapped__", None) is self.original


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the home of `BaseTuner` as Python would, and has it wrapped once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
            _seam.wrap(module)


_seam, _finder = _Seam(), _Finder()


def main() -> None:
    """Run a script or a module as Python would, with this module imported before it."""
    match sys.argv[1:]:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest] if not script.startswith("-"):
            sys.argv = [script, *rest]
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
        case _:
            sys.exit("usage: python -m pyfastlora.auto [-m MODULE | SCRIPT] [ARGUMENT ...]")


if __name__ == "__main__":
    from pyfastlora import auto  # under its own name: a script that imports it finds this one

    auto.main()
else:
    enable()
