"""The life of a compiled library: many cold starts at once, a killed build, no place to write, no compiler.

The programs under test are processes of their own, and what they build is the library of small_library.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import small_library

from pyfastlora import _cache, _jit

PROLOGUE = """
import sys
from pathlib import Path
import torch
from torch.utils import cpp_extension
from pyfastlora import _jit
from pyfastlora.ops import _native
_jit.csrc = lambda: Path(sys.argv[1])
"""
USE = "print(_native.why_not() or f'level {torch.ops.pyfastlora.cpu_level()}')\n"
NO_NINJA = "cpp_extension.is_ninja_available = lambda: False\n"
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """The sources the programs under test compile: two files."""
    small = tmp_path / "csrc"
    small_library.write(small)
    return small


class Machine:
    """Starts programs with a cache, a home and a directory for temporary files of their own."""

    def __init__(self, root: Path, csrc: Path) -> None:
        self.csrc = csrc
        self.cache = root / "cache"
        self.tmp = root / "tmp"
        self.tmp.mkdir()
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(root / "home"),
            "TMPDIR": str(self.tmp),
            "FASTLORA_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }

    def start(self, code: str, *prefix: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", PROLOGUE + code, str(self.csrc)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env | env,
            start_new_session=True,
        )

    def run(self, code: str, *prefix: str, **env: str) -> tuple[str, str]:
        """(stdout, stderr) of a program that ends well."""
        process = self.start(code, *prefix, **env)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out.strip(), err

    def compiler(self, script: str) -> str:
        """A program for CXX: `script` when asked to compile, the true compiler for anything else."""
        path = self.csrc.parent / "cxx"
        path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {script} ;; esac\nexec {COMPILER} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def entries(self) -> list[Path]:
        return list(self.cache.glob("kernels-*/pyfastlora_kernels.so"))


@pytest.fixture
def machine(tmp_path: Path, csrc: Path) -> Machine:
    return Machine(tmp_path, csrc)


@pytest.mark.parametrize("route", ["", NO_NINJA], ids=["cpp_extension", "without ninja"])
def test_builds_once_then_loads(machine, route):
    log = machine.csrc.parent / "log"
    cxx = machine.compiler(f"echo compiled >> {log}")
    first, announced = machine.run(route + USE, CXX=cxx)
    again, silent = machine.run(route + USE, CXX=cxx)
    assert first.startswith("level 1") and first == again
    assert announced.count("Building") == 1 and str(machine.cache) in announced and silent == ""
    assert log.read_text().split() == ["compiled"] * 2  # one per source, all of them in the first program
    assert [path.name for path in machine.cache.glob(".build-*")] == []
    assert machine.cache.stat().st_mode & 0o777 == 0o700


def test_eight_cold_starts_compile_once(machine):
    log = machine.csrc.parent / "log"
    cxx = machine.compiler(f"echo compiled >> {log}")
    waiting = "print('ready', flush=True); input()\n"
    programs = [machine.start(waiting + USE, CXX=cxx) for _ in range(8)]
    for program in programs:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
    said = [program.communicate() for program in programs]
    assert {out.strip().partition(" ")[0] for out, _ in said} == {"level"}, said
    assert sum(err.count("Building") for _, err in said) == 1
    assert log.read_text().split() == ["compiled"] * 2
    assert len(machine.entries()) == 1 and not list(machine.cache.glob(".build-*"))


def test_a_killed_build_is_built_again(machine):
    begun = machine.csrc.parent / "begun"
    never = machine.csrc.parent / "never"
    os.mkfifo(begun)
    os.mkfifo(never)
    victim = machine.start(USE, CXX=machine.compiler(f"echo > {begun}; read x < {never}"))
    try:
        begun.read_text()  # returns when a compiler has started; it does not end by itself
        victim.kill()
        victim.wait()
        assert machine.entries() == [] and len(list(machine.cache.glob(".build-*"))) == 1
        assert machine.run(USE)[0].startswith("level 1")
    finally:
        for process in psutil.process_iter():  # compilers outlive it, in groups of ninja's making
            with contextlib.suppress(psutil.Error):
                if any(str(machine.csrc.parent) in word for word in process.cmdline()):
                    process.kill()
        victim.communicate()


def test_what_killed_builds_leave_is_swept(machine):
    machine.cache.mkdir(mode=0o700)
    old, young = machine.cache / ".build-old", machine.cache / ".build-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 2 * _cache.ABANDONED,) * 2)
    machine.run(USE)
    assert not old.exists() and young.exists()


def as_plain_user() -> list[str]:
    """What to put before a command for file modes to bind it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root ignores file modes, and there is no setpriv to take that away")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


@contextlib.contextmanager
def read_only(*directories: Path) -> Iterator[None]:
    for directory in directories:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o500)
    try:
        yield
    finally:
        for directory in directories:
            directory.chmod(0o700)


def test_read_only_home_and_cache(machine):
    home = Path(machine.env["HOME"])
    del machine.env["FASTLORA_CACHE"]
    with read_only(home):
        first, _ = machine.run(USE, *as_plain_user())
        again, silent = machine.run(USE, *as_plain_user())
    private = machine.tmp / f"pyfastlora-{os.getuid()}"
    assert first.startswith("level 1") and again == first and "Building" not in silent
    assert len(list(private.glob("kernels-*"))) == 1 and private.stat().st_mode & 0o777 == 0o700


def test_a_read_only_cache_is_read(machine):
    machine.run(USE)
    with read_only(machine.cache):
        out, err = machine.run(USE, *as_plain_user())
    assert out.startswith("level 1") and "Building" not in err


def test_a_cache_that_is_a_file(machine):
    machine.cache.write_text("not a directory")
    assert machine.run(USE)[0].startswith("level 1")
    assert len(list(machine.tmp.glob("pyfastlora-*/kernels-*"))) == 1


def test_no_place_at_all(machine):
    machine.cache.write_text("")
    (machine.tmp / f"pyfastlora-{os.getuid()}").write_text("")
    out, _ = machine.run(USE)
    assert out.startswith("not built: no cache directory is usable (") and out.endswith("set FASTLORA_CACHE")
    assert str(machine.cache) in out and str(machine.tmp) in out


OPS = """
from pyfastlora.ops import BackendError, backend, glu_forward
gate, up = torch.randn(3, 8), torch.randn(3, 8)
torch.testing.assert_close(glu_forward(gate, up), torch.nn.functional.silu(gate) * up)
glu_forward(gate, up)
try:
    with backend("cpu"):
        glu_forward(gate, up)
except BackendError as error:
    print(error)
"""


def test_no_compiler(machine):
    out, err = machine.run(OPS, CXX="/nowhere/c++", PATH="/nowhere")
    assert "cpu        not built: no C++ compiler (CXX=/nowhere/c++ not found); install g++" in out
    assert err.count("no C++ compiler") == 1


def test_a_library_serves_where_the_compiler_is_gone(machine):
    machine.run(USE)
    out, err = machine.run(USE, PATH="/nowhere")
    assert out.startswith("level 1") and err == ""


@pytest.mark.parametrize("route", ["", NO_NINJA], ids=["cpp_extension", "without ninja"])
def test_a_compiler_that_fails(machine, route):
    cxx = machine.compiler("for i in $(seq 40); do echo line $i.; done; exit 1")
    out, err = machine.run(route + OPS, CXX=cxx)
    (log,) = machine.cache.glob("kernels-*.log")
    assert "line 1." in log.read_text() and "line 40." in log.read_text()
    assert f"cpu        not built: {cxx} failed, log in {log}; run `CXX=g++ fastlora build`" in out
    shown = [line for line in err.splitlines() if line.startswith("    ")]
    assert len(shown) == _jit.TAIL and any("line 40." in line for line in shown)
    assert err.count(f"{cxx} failed, so the next backend runs") == 1  # two calls ran, and one asked by name
    assert err.rstrip().endswith(f"The whole log is in {log}. To fix it, run `CXX=g++ fastlora build`.")
    assert machine.entries() == [] and not list(machine.cache.glob(".build-*"))
    assert machine.run(USE)[0].startswith("level 1"), "a failure must not be remembered by the next process"


def test_building_can_be_forbidden(machine):
    out, err = machine.run(USE, FASTLORA_JIT="0")
    assert out == "not built, and FASTLORA_JIT=0 forbids it: run `fastlora build`"
    assert err == "" and not machine.cache.exists()


def test_max_jobs(machine):
    for i in range(6):
        (machine.csrc / "cpu" / f"more{i}.cpp").write_text(f"int more{i}() {{ return {i}; }}\n")
    busy, overlap = machine.csrc.parent / "busy", machine.csrc.parent / "overlap"
    once = f'mkdir {busy} || touch {overlap}; {COMPILER} "$@"; code=$?; rmdir {busy}; exit $code'
    for route in ("", NO_NINJA):
        force = "_jit.build(_native.recipe(), force=True)\n"
        machine.run(route + force, CXX=machine.compiler(once), MAX_JOBS="1")
        assert not overlap.exists()


def test_imports_touch_nothing(machine):
    home = Path(machine.env["HOME"])
    home.mkdir()
    machine.run("import pyfastlora.ops, pyfastlora.host\n")
    assert not machine.cache.exists() and not list(home.iterdir()) and not list(machine.tmp.iterdir())


def test_the_kernels_use_the_stable_abi_only():
    from pyfastlora.ops import _native

    assert _native.why_not() is None
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    listed = subprocess.run(
        ["nm", "-DC", "--undefined-only", _native.library()], capture_output=True, text=True
    )
    names = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith(("c10::", "at::", "torch::", "Py"))]
