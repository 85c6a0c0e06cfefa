"""What pip makes of the checkout: wheels, an editable install, and the two lists of requirements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import small_library
from packaging.requirements import Requirement
from packaging.version import Version

from pyfastlora import _jit

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyfastlora", "csrc", "examples", "kernels_triton")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Names what the package would compile, and the key of it: equal where the sources are complete and the same.
LOOK = """
from pyfastlora import _jit, host
from pyfastlora.ops import _native
print(_jit.csrc())
print(_native.recipe().key(), host.recipe().key())
"""
FETCH = "from pyfastlora.cli.main import main; main(['fetch-examples', 'fetched'])"
TRITON = "import pyfastlora.kernels_triton\n"
TRITON_FILES = ("kernels_triton/__init__.py", "kernels_triton/tuning.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy without build products, so that nothing is written into this one."""
    copy = tmp_path / "checkout"
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_prebuilt"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def python(*arguments: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def wheel(checkout: Path, **env: str) -> Path:
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheels", ".")
    python(*command, cwd=checkout, **env)
    (made,) = (checkout / "wheels").iterdir()
    return made


def unpacked(archive: Path, directory: Path) -> Path:
    with zipfile.ZipFile(archive) as content:
        content.extractall(directory)
    return directory


def test_the_wheel_needs_no_torch_and_no_compiler(checkout, tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "torch.py").write_text("raise ImportError('torch was imported')\n")
    made = wheel(checkout, PYTHONPATH=str(tmp_path / "absent"), CXX="/nowhere/c++")
    assert made.name.endswith("-py3-none-any.whl")

    with zipfile.ZipFile(made) as content:
        files = set(content.namelist())
        metadata = content.read(next(name for name in files if name.endswith("/METADATA"))).decode()
    sources = {path for path in (ROOT / "csrc").rglob("*.[ch]*") if "tests" not in path.parts}
    assert {f"pyfastlora/csrc/{path.relative_to(ROOT / 'csrc')}" for path in sources} <= files
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".md", ".py", ".yaml")}
    assert {f"pyfastlora/examples/{name}" for name in examples} <= files
    assert {"pyfastlora/py.typed", *(f"pyfastlora/{path}" for path in TRITON_FILES)} <= files
    assert any(name.endswith("/licenses/LICENSE") for name in files)
    assert not [name for name in files if name.endswith((".so", ".o")) or "/tests/" in name]
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("qlora", "deepspeed", "triton", "nvcc", "bench", "examples", "test"):
        assert f"Provides-Extra: {extra}" in metadata

    installed = unpacked(made, tmp_path / "installed")
    where, keys = python("-c", TRITON + LOOK, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert where == str(installed / "pyfastlora" / "csrc")
    python("-c", FETCH, cwd=tmp_path, PYTHONPATH=str(installed))
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == examples
    assert keys == python("-c", LOOK, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()[1]


def test_an_editable_install_uses_the_checkout(checkout, tmp_path):
    build = "import sys\nfrom setuptools import build_meta\nprint(build_meta.build_editable(sys.argv[1]))"
    python("-c", build, tmp_path, cwd=checkout)
    (made,) = tmp_path.glob("*.whl")
    site = unpacked(made, tmp_path / "site")
    # -S and this order: an editable install that the tests themselves run from must not be found first.
    libraries = sysconfig.get_path("purelib")
    prologue = f"import site, sys\nsite.addsitedir({str(site)!r})\nsys.path.append({libraries!r})\n"
    code = prologue + TRITON + LOOK
    where, keys = python("-S", "-c", code, cwd=tmp_path, PYTHONPATH="").splitlines()
    assert where == str(checkout / "csrc")
    assert keys == python("-c", LOOK, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()[1]


@pytest.mark.skipif(_jit.find_compiler() is None, reason="needs a C++ compiler")
def test_a_wheel_with_the_libraries_inside(checkout, tmp_path):
    small_library.write(checkout / "csrc")
    made = wheel(checkout, FASTLORA_AOT="1")
    assert "-py3-none-" in made.name and not made.name.endswith("-any.whl")

    installed = unpacked(made, tmp_path / "installed")
    use = (
        "from pyfastlora import host\nfrom pyfastlora.ops import _native\n"
        "print(_native.why_not(), host.why_not())\nprint(_native.library())\nprint(host.library())\n"
    )
    elsewhere = {
        "FASTLORA_CACHE": str(tmp_path / "cache"),
        "PATH": "/nowhere",
        "CXX": "",
        "FASTLORA_JIT": "0",
    }
    reasons, *libraries = python("-c", use, cwd=tmp_path, PYTHONPATH=str(installed), **elsewhere).splitlines()
    assert reasons == "None None"
    assert [Path(path).parents[1] for path in libraries] == [installed / "pyfastlora" / "_prebuilt"] * 2
    assert not (tmp_path / "cache").exists()


def pins_of(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {Requirement(line).name.lower().replace("_", "-"): line.partition("==")[2] for line in lines}


def test_the_tested_set_is_within_the_ranges():
    pins = pins_of("constraints.txt")
    optional = PROJECT["optional-dependencies"]
    stated = [*PROJECT["dependencies"], *(line for extra in optional.values() for line in extra)]
    unpinned = {"pyfastlora", "cuda-toolkit"}  # ourselves, and what no test here runs with
    for requirement in map(Requirement, stated):
        if requirement.name in unpinned:
            continue
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert Version(pin) in requirement.specifier, f"{requirement} excludes the {pin} of constraints.txt"


def test_the_ends_of_the_ranges_are_tested():
    oldest = pins_of("constraints-oldest.txt")
    newest = pins_of("constraints.txt") | pins_of("constraints-newest.txt")
    ranges = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    for name in ("transformers", "peft"):
        (lower,) = (each.version for each in ranges[name] if each.operator == ">=")
        assert Version(oldest[name]) == Version(lower)
        assert Version(newest[name]) in ranges[name] and Version(newest[name]) > Version(oldest[name])
