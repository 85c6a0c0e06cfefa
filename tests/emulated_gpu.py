"""A pytest plugin: the GPU kernels of csrc/cuda take CPU tensors, run by csrc/tests/gpu_emulator.h.

    python -m pytest -p emulated_gpu tests/ops -k gpu      (with PYTHONPATH=tests)

With FASTLORA_EMULATE=plain they take the ways of chips before sm_80 and of AMD's (FASTLORA_PLAIN in gpu.h).
The ops' own tests then hold the implementation "gpu" to the same oracles as every other. A process is either
emulated or not: the libraries register the same ops. tests/ops/test_emulated_gpu.py runs it.
"""

import os
from pathlib import Path

from pyfastlora import _jit
from pyfastlora.ops import _native, _registry

FLAGS = ("-DFASTLORA_EMULATE_GPU", "-O1", "-Wno-unknown-pragmas", "-x", "c++")
if os.environ.get("FASTLORA_EMULATE") == "plain":
    FLAGS = ("-DFASTLORA_EMULATE_PLAIN", *FLAGS)


def recipe() -> _jit.Recipe:
    """The CPU's library with csrc/cuda compiled as C++."""
    csrc = _jit.csrc()
    real = _recipe()
    return _jit.Recipe(
        name="emulated-gpu-kernels",
        library="pyfastlora_emulated_gpu_kernels.so",
        sources=(*real.sources, *sorted((csrc / "cuda").glob("*.cu"))),
        headers=(*real.headers, *sorted((csrc / "cuda").glob("*.h")), csrc / "tests" / "gpu_emulator.h"),
        flags=(*real.flags, *FLAGS),
        link=real.link,
        flavour=real.flavour,
        compile=_compile,
    )


def _compile(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
    from torch.utils import cpp_extension

    link = [f"-L{path}" for path in cpp_extension.library_paths()]
    _jit.compile_directly(recipe, compiler, directory, cpp_extension.include_paths(), link)


def _why_not_gpu(problem: _registry.Problem) -> str | None:
    if problem.dtype not in _registry.FLOATS:
        return f"has {', '.join(_registry.FLOATS)}"
    return _native.why_not()


_recipe, _native.recipe = _native.recipe, recipe
for _op in _registry.all_ops():
    _op.implementations = tuple(
        _registry.Implementation(each.name, each.run, _why_not_gpu) if each.name == "gpu" else each
        for each in _op.implementations
    )
