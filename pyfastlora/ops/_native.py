"""The compiled kernels, as `torch.ops.pyfastlora.*`: found, or built, when the first op asks for them.

csrc/bindings.cpp speaks the stable ABI of torch 2.11, so one library serves every Python and every torch from
there on; only torch's flavour (cpu, CUDA major, HIP major) is part of its key. The life cycle is in `_jit`.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from pyfastlora import _jit

logger = logging.getLogger("pyfastlora")

FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
# libtorch must be among the library's own needs although no symbol is taken from it directly: through it the
# symbols of libtorch_cuda are found, which a CUDA torch has and a CPU torch has not.
LINK = (
    ("-shared", "-undefined", "dynamic_lookup")
    if sys.platform == "darwin"
    else ("-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed")
)
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

_lock = threading.Lock()
_outcome: list[str | None] = []  # empty until the first why_not(), then what it answers
_library: list[Path] = []  # the file in use


def why_not() -> str | None:
    """Why `torch.ops.pyfastlora.*` cannot be used, in one sentence, or None.

    The first call loads or builds the library. A failure is logged once and holds for the process.
    """
    if not _outcome:
        with _lock:
            if not _outcome:
                _outcome.append(_load())
    return _outcome[0]


def cpu_level() -> str:
    """The instruction set the kernels use on this CPU: "portable", "avx2", "avx512", "avx512_bf16" or "amx".

    FASTLORA_CPU_LEVEL may lower it. Without the compiled kernels the answer is "portable".
    """
    if why_not():
        return LEVELS[0]
    import torch

    return LEVELS[torch.ops.pyfastlora.cpu_level()]


def recipe() -> _jit.Recipe:
    """How the library for the installed torch is made. Every csrc/cpu/*.cpp belongs to it."""
    csrc = _jit.csrc()
    return _jit.Recipe(
        name="kernels",
        library="pyfastlora_kernels.so",
        # bindings.cpp first: started last, the one file with torch headers would finish alone.
        sources=(csrc / "bindings.cpp", *sorted((csrc / "cpu").glob("*.cpp"))),
        headers=(*sorted(csrc.glob("*.h")), *sorted((csrc / "cpu").glob("*.h"))),
        flags=FLAGS,
        link=LINK,
        flavour=f"torch {_torch_flavour()}",
        compile=_compile,
    )


def library() -> Path | None:
    """The library in use; None where there is none."""
    return None if why_not() else _library[0]


def _load() -> str | None:
    if os.name != "posix":
        return "not built: the kernels need Linux or macOS"
    import torch

    def load(library: Path) -> None:
        torch.ops.load_library(library)
        _library.append(library)

    try:
        _jit.obtain(recipe(), load)
    except _jit.BuildError as error:
        if os.environ.get("FASTLORA_JIT") != "0":
            logger.warning("pyfastlora's kernels: %s", error.report)
        return str(error)
    return None


def _torch_flavour() -> str:
    import torch

    for name, version in (("cuda", torch.version.cuda), ("hip", torch.version.hip)):
        if version:
            return name + version.partition(".")[0]
    return "cpu"


def _compile(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
    from torch.utils import cpp_extension

    link = [f"-L{path}" for path in cpp_extension.library_paths()]
    # cpp_extension looks up ninja and the compiler by itself, and asks the compiler for its version. Where it
    # would find another one, or no answer, it is left out.
    same = shlex.split(os.environ.get("CXX", "c++")) == list(compiler.command) and compiler.version
    if not same or not cpp_extension.is_ninja_available():
        return _jit.compile_directly(recipe, compiler, directory, cpp_extension.include_paths(), link)
    try:
        made = cpp_extension.load(
            name=recipe.name,
            sources=[str(source) for source in recipe.sources],
            extra_cflags=[*recipe.flags, *_jit.extra_flags()],
            extra_ldflags=[*link, *recipe.link],
            # Fresh: cpp_extension's own lock outlives a killed process and blocks the next (torch 2.13).
            build_directory=str(directory),
            # Its way of saying "build, do not load": the library is loaded from its final place.
            is_python_module=False,
            is_standalone=True,
        )
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise _jit.CompileError(str(error)) from None
    os.replace(made, directory / recipe.library)
