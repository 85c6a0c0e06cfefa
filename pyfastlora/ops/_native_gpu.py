"""The compiled GPU kernels: the "cuda" key of `torch.ops.pyfastlora.*`, for NVIDIA's and, through HIP, AMD's
chips.

Found, or built, when an op on a GPU first asks for them. A library holds machine code for a list of archs,
which its manifest names, and PTX of the newest, which the driver can turn into code for later ones; on an
arch that it does not serve the next implementation runs. It is linked like the CPU's library (`_native`),
against torch's stable ABI alone, so a torch without CUDA is enough to build it and any torch with that CUDA
major loads it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyfastlora import _jit
from pyfastlora.ops import _native

if TYPE_CHECKING:
    import torch

# What a wheel holds, and what is built where no GPU says more: A100, RTX 30, RTX 40, H100, B200, RTX 50.
SHIPPED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHIPPED_HIP = ("gfx90a", "gfx942", "gfx1100")
# Code for one minor version runs on the later ones of its major, but for these (CUDA programming guide).
JETSON = {72, 87}

NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra", "-DFASTLORA_GPU")
HIPCC_FLAGS = ("-x", "hip", "-O3", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-DFASTLORA_GPU")

_lock = threading.Lock()
_outcome: list[str | None] = []  # empty until the first _load(), then what it answered
_library: list[Path] = []


@dataclass(frozen=True, slots=True)
class Toolkit:
    """nvcc or hipcc, as found. `root` holds the runtime's library."""

    command: str
    version: str  # "13.0.88"
    root: Path
    hip: bool

    def __str__(self) -> str:
        return f"{'hipcc' if self.hip else 'nvcc'} {self.version}"


def why_not(arch: str) -> str | None:
    """Why the compiled GPU kernels cannot run on `arch` ("sm_90", "gfx942"), or None. May build them."""
    return why_not_here() or _unserved(arch, archs())


def why_not_here() -> str | None:
    """Why there is no library of GPU kernels in this process, in one sentence, or None."""
    if reason := _native.why_not():
        return reason
    if not _outcome:
        with _lock:
            if not _outcome:
                _outcome.append(_load())
    return _outcome[0]


def archs() -> tuple[str, ...]:
    """What the library in use was compiled for; empty where there is none."""
    said = _jit.manifest(_library[0].parent) if _library else None
    return tuple(said["archs"]) if said else ()


def library() -> Path | None:
    """The library in use; None where there is none, or no op has asked for it yet."""
    return _library[0] if _library else None


def wanted_archs() -> tuple[str, ...]:
    """The archs to compile for: FASTLORA_ARCHS, else those of the visible GPUs, else the shipped ones."""
    import torch

    if named := os.environ.get("FASTLORA_ARCHS"):
        return parse_archs(named)
    if torch.cuda.is_available():
        return tuple(sorted({arch_of(index) for index in range(torch.cuda.device_count())}))
    return SHIPPED_HIP if torch.version.hip else SHIPPED


def arch_of(device: torch.device | int) -> str:
    """Compute capability ("sm_90") or gfx name of a GPU."""
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def parse_archs(text: str) -> tuple[str, ...]:
    """("sm_80", "sm_90") from "80,9.0" or "sm_80 sm_90"; gfx names stay as they are. Raises ValueError."""
    found = []
    for item in filter(None, re.split(r"[,; ]+", text)):
        name = item.lower().removeprefix("sm_").replace(".", "")
        if not re.fullmatch(r"gfx[0-9a-f]{3,4}|[0-9]{2,3}[af]?", name):
            raise ValueError(f"GPU archs {text!r}: {item!r} is none such as 90, 12.0 or gfx942")
        found.append(name if name.startswith("gfx") else f"sm_{name}")
    if not found:
        raise ValueError(f"GPU archs {text!r}: name at least one, such as 80,90 or gfx942")
    if len({name.startswith("gfx") for name in found}) > 1:
        raise ValueError(f"GPU archs {text!r}: a library is for NVIDIA's chips or for AMD's")
    return tuple(dict.fromkeys(found))


def recipe(archs: Sequence[str]) -> _jit.Recipe:
    """How the library for these archs is made. Every csrc/cuda/*.cu belongs to it."""
    csrc = _jit.csrc()
    hip = archs[0].startswith("gfx")
    return _jit.Recipe(
        name="gpu-kernels",
        library="pyfastlora_gpu_kernels.so",
        sources=(csrc / "bindings.cpp", *sorted((csrc / "cuda").glob("*.cu"))),
        headers=(*sorted(csrc.glob("*.h")), *sorted((csrc / "cuda").glob("*.h"))),
        flags=HIPCC_FLAGS if hip else NVCC_FLAGS,
        link=_native.LINK,
        flavour=f"torch {_flavour(hip)}",
        compile=_compile,
        archs=tuple(archs),
        toolkit=str(find_toolkit(hip) or ""),
    )


def find_toolkit(hip: bool = False) -> Toolkit | None:
    """The first compiler, in the order of `_candidates`, of the CUDA major that torch has; else the first."""
    import torch

    found = [toolkit for command in _candidates(hip) if (toolkit := _ask(command, hip))]
    fits = (each for each in found if _major(each.version) == _major(torch.version.cuda or each.version))
    return next(fits, found[0] if found else None)


def _candidates(hip: bool) -> Iterator[str]:
    """Named by the user, in the toolkit that the environment names, on PATH, from a wheel, in the usual
    place.
    """
    name, roots = ("hipcc", ("ROCM_HOME", "ROCM_PATH")) if hip else ("nvcc", ("CUDA_HOME", "CUDA_PATH"))
    if named := os.environ.get(f"FASTLORA_{name.upper()}"):
        yield named
        return  # what was asked for, or nothing
    yield from (str(Path(os.environ[root], "bin", name)) for root in roots if os.environ.get(root))
    yield from filter(None, [shutil.which(name)])
    if not hip:
        yield from map(
            str, sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"), reverse=True)
        )
    yield "/opt/rocm/bin/hipcc" if hip else "/usr/local/cuda/bin/nvcc"


@functools.cache
def _ask(command: str, hip: bool) -> Toolkit | None:
    program = shutil.which(command)
    if program is None:
        return None
    try:
        said = _run(command, "--version").stdout
        # nvcc may be a wrapper script: only nvcc itself knows where its toolkit is.
        plan = "" if hip else _run(command, "-x", "cu", "--dryrun", "-c", os.devnull).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"HIP version: ([\d.]+)" if hip else r"V(\d+\.\d+\.\d+)", said)
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    root = Path(top[1].strip()) if top else Path(program).resolve().parents[1]
    return Toolkit(command, version[1], root, hip) if version else None


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _major(version: str) -> str:
    return version.partition(".")[0]


def _load() -> str | None:
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return f"needs a torch with CUDA or ROCm; this is {torch.__version__}"

    def load(library: Path) -> None:
        torch.ops.load_library(library)
        _library.append(library)

    try:
        archs = wanted_archs()
        if not (torch.cuda.is_available() or os.environ.get("FASTLORA_ARCHS")):
            if _load_another(recipe(archs), (), load):
                return None
            return "torch sees no GPU here; `fastlora build` compiles ahead of time for another machine's"
        try:
            _jit.obtain(recipe(archs), load)
        except _jit.BuildError:
            if not _load_another(recipe(archs), archs, load):
                raise
    except (_jit.BuildError, ValueError) as error:
        if os.environ.get("FASTLORA_JIT") != "0":
            _native.logger.warning("pyfastlora's GPU kernels: %s", getattr(error, "report", error))
        return str(error)
    return None


def _load_another(recipe: _jit.Recipe, archs: Sequence[str], load: Callable[[Path], None]) -> bool:
    """Load a library that was compiled for other archs and serves these, as one in a wheel may: its first use
    costs the translation of PTX, or nothing.
    """
    for library in _jit.find(replace(recipe, archs=()), None):
        built = (_jit.manifest(library.parent) or {}).get("archs", ())
        if not any(_unserved(arch, built) for arch in archs):
            try:
                load(library)
                return True
            except OSError:
                continue
    return False


def _unserved(arch: str, built: Sequence[str]) -> str | None:
    """Why code for `built` does not run on `arch`: that takes its major and no higher minor, or older PTX."""
    if {arch, f"{arch}a", f"{arch}f"} & {*built}:
        return None
    if arch.startswith("sm_"):
        number, plain = int(arch[3:]), {int(name[3:]) for name in built if name[3:].isdigit()}
        binary = {one for one in plain if one // 10 == number // 10 and one <= number} - JETSON
        if (binary and number not in JETSON) or number > max(plain, default=number):
            return None
    was = f"built for {', '.join(built)}; this GPU is {arch}"
    return f"{was}: run `FASTLORA_ARCHS={arch.removeprefix('sm_')} fastlora build`"


def _compile(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
    from torch.utils import cpp_extension

    hip = recipe.archs[0].startswith("gfx")
    toolkit = _toolkit_or_error(recipe.archs)
    device = [toolkit.command, *recipe.flags, *targets(recipe.archs)]
    if not hip and len(compiler.command) == 1:  # nvcc takes a program, not a command such as "ccache g++"
        device += ["-ccbin", *compiler.command]
    if not hip and int(_major(toolkit.version)) >= 13:
        # A quarter of the bytes. Drivers older than CUDA 12.4's, which CUDA 12 still runs on, cannot read it.
        device += ["--compress-mode=size"]
    host_flags = [*_native.FLAGS, "-DFASTLORA_GPU", *_jit.extra_flags()]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    objects = [directory / f"{source.name}.o" for source in recipe.sources]
    _jit.run_commands(
        [
            [*device, "-c", source, "-o", made]
            if source.suffix == ".cu"
            else [*compiler.command, *includes, *host_flags, "-c", source, "-o", made]
            for source, made in zip(recipe.sources, objects, strict=True)
        ],
        directory,
    )
    where = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = [toolkit.root / "lib64", toolkit.root / "lib", *toolkit.root.glob("targets/*/lib")]
    where += [f"-L{path}" for path in libraries]  # a toolkit has the first, wheels have the second
    # Static: torch's own copy of the runtime may lie where no loader looks, and both share the driver's
    # context.
    runtime = ["-lamdhip64"] if hip else ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link = [*where, *recipe.link, *runtime]
    made = directory / recipe.library
    _jit.run_commands([[*compiler.command, *objects, *link, "-o", made]], directory)


def targets(archs: Sequence[str]) -> list[str]:
    """The compiler's options for these archs, and for PTX of the newest."""
    if archs[0].startswith("gfx"):
        return [f"--offload-arch={arch}" for arch in archs]
    numbers = [arch.removeprefix("sm_") for arch in archs]
    newest = max((number for number in numbers if number.isdigit()), key=int, default=None)
    ptx = [f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else []
    return [*(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers), *ptx]


def _toolkit_or_error(archs: Sequence[str]) -> Toolkit:
    """The compiler for these archs. Raises BuildError where there is none, or not the right one."""
    import torch

    hip = archs[0].startswith("gfx")
    toolkit = find_toolkit(hip)
    if toolkit is None:
        setting = "FASTLORA_HIPCC" if hip else "FASTLORA_NVCC"
        if named := os.environ.get(setting):
            raise _jit.BuildError(f"not built: {setting}={named} does not answer to --version")
        remedy = "install ROCm's" if hip else "run `pip install 'pyfastlora[nvcc]'`"
        raise _jit.BuildError(f"not built: no {'hipcc' if hip else 'nvcc'}; {remedy}, or set {setting}")
    if hip:
        return toolkit
    theirs = torch.version.cuda
    mismatch = theirs and _major(theirs) != _major(toolkit.version)
    if mismatch and os.environ.get("FASTLORA_ALLOW_CUDA_MISMATCH") != "1":
        raise _jit.BuildError(
            f"not built: {shlex.quote(toolkit.command)} is CUDA {toolkit.version}, torch is built for "
            f"{theirs}; set FASTLORA_NVCC to an nvcc of CUDA {theirs}, or FASTLORA_ALLOW_CUDA_MISMATCH=1"
        )
    has = _run(toolkit.command, "--list-gpu-code").stdout.split()
    if lacking := [arch for arch in archs if arch.rstrip("af") not in has]:
        raise _jit.BuildError(
            f"not built: {toolkit} cannot compile for {', '.join(lacking)}; it has {', '.join(has)}"
        )
    return toolkit


def _flavour(hip: bool) -> str:
    """torch's; of a torch without a GPU, what the compiler at hand makes."""
    import torch

    name, version = ("hip", torch.version.hip) if hip else ("cuda", torch.version.cuda)
    if not version:
        toolkit = find_toolkit(hip)
        version = toolkit.version if toolkit else ""
    return name + _major(version)
