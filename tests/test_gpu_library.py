"""The library of GPU kernels as a whole: what it is linked against, who may load it, and what is said where
there is none. Everything but a launch, so no GPU is needed; what compiles is skipped where nvcc is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pyfastlora import _jit
from pyfastlora.cli.main import main
from pyfastlora.ops import _native, _native_gpu, all_ops
from pyfastlora.ops._native_gpu import SHIPPED, Toolkit


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("FASTLORA_ARCHS", "FASTLORA_ALLOW_CUDA_MISMATCH"):
        monkeypatch.delenv(name, raising=False)


# ---- what is compiled ---------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(
    _native_gpu.find_toolkit() is None or _jit.find_compiler() is None,
    reason="needs nvcc (pip install 'pyfastlora[nvcc]') and a C++ compiler",
)
ARCHS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def library():
    """What `fastlora build --archs 80,90` leaves in the cache of the tests, and what it prints."""
    result = CliRunner().invoke(main, ["build", "--archs", "80,90"])
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("gpu-kernels for "))
    found = re.fullmatch(r"gpu-kernels for (.*): (.*) \((was there|built in [\d.]+ s)\)", line)
    assert found and found[1] == ", ".join(ARCHS)
    return Path(found[2])


@needs_nvcc
def test_the_manifest(library):
    said = json.loads((library.parent / _jit.MANIFEST).read_text())
    toolkit = _native_gpu.find_toolkit()
    assert {*ARCHS} <= {*said["archs"]}
    assert said["flavour"] == f"torch cuda{toolkit.version.partition('.')[0]}"
    assert said["compiler"].startswith(f"{toolkit}, ")


@needs_nvcc
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_it_asks_torch_for_the_stable_abi_only(library):
    """Of a C++ type of torch, or of the CUDA runtime's shared library, nothing: any torch of this CUDA major
    loads it, wherever the runtime lies."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    strong = {line.split()[1] for line in listed.stdout.splitlines() if line.split()[0] == "U"}
    system = {name for name in strong if re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)}
    assert "aoti_torch_get_current_cuda_stream" in strong
    assert [name for name in strong - system if not name.startswith(("aoti_torch_", "torch_"))] == []


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_what_it_is_linked_against(library):
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listed)}
    assert {"libtorch", "libtorch_cpu"} <= needed  # through the first, libtorch_cuda where there is one
    assert needed <= {"libtorch", "libtorch_cpu", "libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64"}


def gpu_ops() -> list[str]:
    """The operators that bindings.cpp registers for GPUs."""
    text = (_jit.csrc() / "bindings.cpp").read_text()
    block = re.search(r"STABLE_TORCH_LIBRARY_IMPL\(pyfastlora, CUDA, m\) \{\n(.*?)\n\}", text, re.DOTALL)
    return re.findall(r'm\.impl\("(\w+)"', block[1])


LOADS = """
import json, sys
import torch
from pyfastlora.ops import _native_gpu
reason = _native_gpu.why_not_here()
used = str(_native_gpu.library())
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps([reason, used, [op for op in sys.argv[1:] if reason or not has(f"pyfastlora::{op}", "CUDA")],
                  [_native_gpu.why_not(arch) for arch in ("sm_80", "sm_89", "sm_90", "sm_75")]]))
"""


@needs_nvcc
def test_it_loads_where_torch_has_cuda(library):
    """In a process of its own: where no GPU is visible the library is registered, and nothing is launched.

    FASTLORA_CUDA_PYTHON names the Python of an environment whose torch has CUDA, for where this one's has
    not: it loads the very library that this one made, beside CPU kernels of its own.
    """
    python = os.environ.get("FASTLORA_CUDA_PYTHON")
    if torch.version.cuda is None and not python:
        pytest.skip(f"needs a torch with CUDA, here ({torch.__version__}) or at FASTLORA_CUDA_PYTHON")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    done = subprocess.run(
        [python or sys.executable, "-c", LOADS, *gpu_ops()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reason, used, without, (ampere, ada, hopper, turing) = json.loads(done.stdout)
    assert reason is None and without == [] and used == str(library)
    assert ampere is ada is hopper is None
    assert "this GPU is sm_75: run `FASTLORA_ARCHS=75 fastlora build`" in turing


def test_every_op_with_a_gpu_implementation_is_registered():
    named = {op.name for op in all_ops() if any(each.name == "gpu" for each in op.implementations)}
    # What an op's own name is not registered as: dropout_mask draws with torch and packs with dropout_pack.
    registered = {*gpu_ops(), *(["dropout_mask"] if "dropout_pack" in gpu_ops() else [])}
    assert named <= registered, named - registered


# ---- a process that looks for it ---------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not asked yet, with a CUDA torch and no nvcc; gives what it loads."""
    loaded: list[Path] = []
    monkeypatch.setattr(_native_gpu, "_outcome", [])
    monkeypatch.setattr(_native_gpu, "_library", [])
    monkeypatch.setattr(_native_gpu, "find_toolkit", lambda hip=False: None)
    monkeypatch.setattr(_native, "why_not", lambda: None)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return loaded


def put_library(cache: Path, archs: tuple[str, ...]) -> Path:
    """An entry of the cache that says that it was compiled for `archs`."""
    recipe = _native_gpu.recipe(archs)
    entry = cache / f"{recipe.name}-{recipe.key()}-{'-'.join(archs)}"
    entry.mkdir(mode=0o700, parents=True)
    (entry / recipe.library).write_text("code")
    said = {"library": recipe.library, "size": 4, "archs": archs}
    (entry / _jit.MANIFEST).write_text(json.dumps(said))
    return entry / recipe.library


def see(monkeypatch, *capabilities: tuple[int, int]) -> None:
    """GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


def test_an_entry_with_more_archs_will_do(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    library = put_library(tmp_path, ("sm_80", "sm_86", "sm_90"))
    assert list(_jit.find(_native_gpu.recipe(("sm_90", "sm_80")), None)) == [library]
    assert list(_jit.find(_native_gpu.recipe(("sm_90", "sm_89")), None)) == []


def test_a_library_that_serves_the_gpus_is_taken_where_none_can_be_built(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    put_library(tmp_path, ("sm_100",))  # for the first of them only
    right = put_library(tmp_path, SHIPPED)
    see(monkeypatch, (10, 3), (8, 6))
    assert _native_gpu.why_not("sm_103") is None and fresh == [right]
    assert _native_gpu.archs() == SHIPPED and _native_gpu.library() == right


def test_one_that_does_not_serve_it_is_left(fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    put_library(tmp_path, SHIPPED)
    see(monkeypatch, (7, 5))
    no_nvcc = "not built: no nvcc; run `pip install 'pyfastlora[nvcc]'`, or set FASTLORA_NVCC"
    assert _native_gpu.why_not("sm_75") == no_nvcc and fresh == []
    assert caplog.text.count(no_nvcc) == 1


def test_where_no_gpu_is_visible_nothing_is_built(fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_jit, "build", lambda recipe: pytest.fail("builds"))
    see(monkeypatch)
    assert _native_gpu.why_not_here() == (
        "torch sees no GPU here; `fastlora build` compiles ahead of time for another machine's"
    )
    assert caplog.text == ""
    put_library(tmp_path, ("sm_90",))
    _native_gpu._outcome.clear()
    assert _native_gpu.why_not_here() is None and len(fresh) == 1


def test_named_archs_are_taken_at_their_word(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTLORA_ARCHS", "90, volta")
    see(monkeypatch, (9, 0))
    assert _native_gpu.why_not("sm_90") == (
        "GPU archs '90, volta': 'volta' is none such as 90, 12.0 or gfx942"
    )
    monkeypatch.setenv("FASTLORA_ARCHS", "80")
    put_library(tmp_path, ("sm_80",))
    _native_gpu._outcome.clear()
    assert _native_gpu.why_not("sm_75").startswith("built for sm_80; this GPU is sm_75")


def test_a_torch_without_gpus():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("is about a torch for CPUs")
    assert _native_gpu.why_not_here() == f"needs a torch with CUDA or ROCm; this is {torch.__version__}"


# ---- the command line ---------------------------------------------------------------


def test_build_refuses_archs_that_are_none():
    result = CliRunner().invoke(main, ["build", "--archs", "hopper"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "Error: GPU archs 'hopper': 'hopper' is none such as 90, 12.0 or gfx942"
    )


def test_build_where_nvcc_is_missing(monkeypatch):
    """Asked for, it is an error; else a line, as Triton's kernels run."""
    kernels = _native.recipe()
    monkeypatch.setattr(_native, "recipe", lambda: kernels)  # of the true torch, not of this one
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native_gpu, "find_toolkit", lambda hip=False: None)
    result = CliRunner().invoke(main, ["build"])
    assert result.exit_code == 0, result.output
    assert "gpu-kernels: left out: no nvcc was found" in result.output.splitlines()
    result = CliRunner().invoke(main, ["build", "--archs", "75"])
    assert result.exit_code == 1
    assert "Error: gpu-kernels: not built: no nvcc; run `pip install" in result.output


def test_info_names_the_compiler_and_the_library(monkeypatch):
    toolkit = Toolkit("/opt/nvcc", "13.0.88", Path("/opt"), hip=False)
    monkeypatch.setattr(_native_gpu, "find_toolkit", lambda hip: toolkit)
    monkeypatch.setattr(_native_gpu, "why_not_here", lambda: "torch sees no GPU here")
    monkeypatch.setenv("FASTLORA_JIT", "0")  # not --no-build, which sets it for good: for its own process
    said = CliRunner().invoke(main, ["info"]).output
    assert re.search(r"^  nvcc +13\.0\.88, /opt/nvcc$", said, re.MULTILINE)
    assert re.search(r"^  gpu-kernels +torch sees no GPU here$", said, re.MULTILINE)
