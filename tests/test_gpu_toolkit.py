"""Which GPUs to compile for, and with which compiler: what people write, what they have, and the sentence
that they read where it does not fit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pyfastlora import _jit
from pyfastlora.ops import _native_gpu
from pyfastlora.ops._native_gpu import SHIPPED, Toolkit, parse_archs

SETTINGS = ("FASTLORA_NVCC", "FASTLORA_HIPCC", "FASTLORA_ARCHS", "FASTLORA_ALLOW_CUDA_MISMATCH")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


# ---- archs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80,90", ("sm_80", "sm_90")),
        ("9.0", ("sm_90",)),
        ("sm_80 sm_90a; 12.0", ("sm_80", "sm_90a", "sm_120")),
        ("90,90,9.0", ("sm_90",)),
        ("gfx90a,GFX1100", ("gfx90a", "gfx1100")),
    ],
)
def test_archs_as_people_write_them(text, archs):
    assert parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("80,hopper", "GPU archs '80,hopper': 'hopper' is none such as 90, 12.0 or gfx942"),
        ("8", "'8' is none such as"),
        ("sm90", "'sm90' is none such as"),
        ("9.0+PTX", "'9.0+PTX' is none such as"),
        (" , ", "name at least one, such as 80,90 or gfx942"),
        ("90,gfx942", "a library is for NVIDIA's chips or for AMD's"),
    ],
)
def test_archs_that_are_none(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_archs(text)


@pytest.mark.parametrize(
    ("built", "serves", "refuses"),
    [
        # Code for a minor version runs on the later ones of its major; PTX of the newest on everything newer.
        (("sm_80",), ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), ("sm_75", "sm_70")),
        (("sm_86", "sm_120"), ("sm_86", "sm_89", "sm_120", "sm_121"), ("sm_80", "sm_90", "sm_100")),
        (SHIPPED, (*SHIPPED, "sm_103", "sm_121", "sm_130"), ("sm_75", "sm_87", "sm_110")),
        # A Jetson's code is for Jetsons alone.
        (("sm_80", "sm_87", "sm_90"), ("sm_86", "sm_87", "sm_89"), ()),
        (("sm_87", "sm_90"), ("sm_87",), ("sm_88", "sm_89")),
        # Code for an arch's own instructions has no PTX that others could use.
        (("sm_90a",), ("sm_90",), ("sm_80", "sm_100", "sm_120")),
        (("gfx90a", "gfx1100"), ("gfx90a", "gfx1100"), ("gfx942", "gfx1101")),
    ],
)
def test_which_gpus_a_library_serves(built, serves, refuses):
    assert [arch for arch in serves if _native_gpu._unserved(arch, built)] == []
    for arch in refuses:
        name = arch.removeprefix("sm_")
        assert _native_gpu._unserved(arch, built) == (
            f"built for {', '.join(built)}; this GPU is {arch}: run `FASTLORA_ARCHS={name} fastlora build`"
        )


def test_what_is_compiled_for():
    options = _native_gpu.targets(("sm_80", "sm_90", "sm_100a"))
    assert options[:3] == [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90", "100a")]
    assert options[3:] == ["-gencode=arch=compute_90,code=compute_90"]  # PTX of the newest that has any
    assert len(_native_gpu.targets(("sm_90a",))) == 1
    assert _native_gpu.targets(("gfx90a", "gfx942")) == ["--offload-arch=gfx90a", "--offload-arch=gfx942"]


def test_the_archs_that_are_wanted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _native_gpu.wanted_archs() == SHIPPED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (12, 0), (9, 0))[device])
    assert set(_native_gpu.wanted_archs()) == {"sm_90", "sm_120"}
    monkeypatch.setenv("FASTLORA_ARCHS", "8.9")
    assert _native_gpu.wanted_archs() == ("sm_89",)


# ---- compilers ---------------------------------------------------------------


def fake_nvcc(folder: Path, version: str, codes: str = "sm_80 sm_90", top: str | None = None) -> Path:
    """A script that answers as nvcc does, and compiles nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *--version*) echo 'Cuda compilation tools, release {version[:4]}, V{version}' ;;\n"
        f"  *--dryrun*) echo '#$ _HERE_={folder}' >&2; echo '#$ TOP={top or folder.parent}' >&2 ;;\n"
        f"  *--list-gpu-code*) printf '%s\\n' {codes} ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without compilers for GPUs; what a test adds is all there is."""
    for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_HOME", "ROCM_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    candidates = _native_gpu._candidates

    def mine(hip):
        return (each for each in candidates(hip) if each.startswith(str(tmp_path)))

    monkeypatch.setattr(_native_gpu, "_candidates", mine)
    monkeypatch.setattr(_native_gpu.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    return tmp_path


def test_the_order_in_which_nvcc_is_looked_for(machine, monkeypatch):
    assert _native_gpu.find_toolkit() is None
    places = [machine / "named", machine / "home/bin", machine / "path/bin", machine / "bin"]
    wheel = machine / "site/nvidia/cu13/bin"
    scripts = [fake_nvcc(folder, "13.0.88") for folder in (*places, wheel)]
    found = []
    monkeypatch.setenv("FASTLORA_NVCC", str(scripts[0]))
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    monkeypatch.setenv("CUDA_PATH", str(machine / "path"))
    for forget in ("FASTLORA_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", None):
        found.append(_native_gpu.find_toolkit().command)
        if forget == "PATH":
            scripts[3].unlink()
        elif forget:
            monkeypatch.delenv(forget)
    assert found == [str(script) for script in scripts]


def test_a_wrapper_script_leads_to_its_toolkit(machine):
    top = machine / "opt" / "cuda-13.0"
    script = fake_nvcc(machine / "bin", "13.0.88", top=f"{top}/bin/..")
    assert _native_gpu.find_toolkit() == Toolkit(
        "nvcc" if False else str(script), "13.0.88", top / "bin/..", False
    )
    assert str(_native_gpu.find_toolkit()) == "nvcc 13.0.88"


def test_what_does_not_answer_is_passed_over(machine, monkeypatch):
    broken = machine / "home" / "bin" / "nvcc"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    script = fake_nvcc(machine / "bin", "13.0.88")
    assert _native_gpu.find_toolkit().command == str(script)


def test_the_nvcc_of_torchs_cuda_comes_first(machine, monkeypatch):
    old, new = fake_nvcc(machine / "bin", "12.8.93"), fake_nvcc(machine / "site/nvidia/cu13/bin", "13.0.88")
    assert _native_gpu.find_toolkit().command == str(old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _native_gpu.find_toolkit().command == str(new)
    assert _native_gpu.recipe(("sm_90",)).flavour == "torch cuda13"


def why_not_for(*archs: str) -> str:
    with pytest.raises(_jit.BuildError) as error:
        _native_gpu._toolkit_or_error(archs)
    return str(error.value)


def test_no_nvcc(machine, monkeypatch):
    assert why_not_for("sm_90") == (
        "not built: no nvcc; run `pip install 'pyfastlora[nvcc]'`, or set FASTLORA_NVCC"
    )
    assert why_not_for("gfx942") == "not built: no hipcc; install ROCm's, or set FASTLORA_HIPCC"
    fake_nvcc(machine / "bin", "13.0.88")
    monkeypatch.setenv("FASTLORA_NVCC", f"{machine}/nowhere/nvcc")
    assert why_not_for("sm_90") == (
        f"not built: FASTLORA_NVCC={machine}/nowhere/nvcc does not answer to --version"
    )


def test_an_nvcc_of_another_cuda(machine, monkeypatch):
    script = fake_nvcc(machine / "bin", "12.8.93")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_not_for("sm_90") == (
        f"not built: {script} is CUDA 12.8.93, torch is built for 13.0; set FASTLORA_NVCC to an nvcc of CUDA "
        "13.0, or FASTLORA_ALLOW_CUDA_MISMATCH=1"
    )
    monkeypatch.setenv("FASTLORA_ALLOW_CUDA_MISMATCH", "1")
    assert _native_gpu._toolkit_or_error(("sm_90",)).command == str(script)


def test_an_nvcc_that_is_too_old_for_the_gpu(machine):
    fake_nvcc(machine / "bin", "12.4.99", codes="sm_50 sm_80 sm_90")
    assert _native_gpu._toolkit_or_error(("sm_90a",)).version == "12.4.99"
    assert why_not_for("sm_90", "sm_120") == (
        "not built: nvcc 12.4.99 cannot compile for sm_120; it has sm_50, sm_80, sm_90"
    )
