"""Entries of the build cache: what names them, who may load them, how they are replaced.

In this process, with a recipe that "compiles" by copying its source.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from pyfastlora import _cache, _jit

COMPILER = _jit.Compiler(("c++",), "c++ 12.2")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _jit.Recipe:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_jit, "find_compiler", lambda: COMPILER)
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    source.write_text("source")
    header.write_text("header")

    def compile(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
        (directory / recipe.library).write_text(source.read_text())

    return _jit.Recipe("toy", "toy.so", (source,), (header,), ("-O1",), ("-shared",), "plain", compile)


def test_the_key_covers_what_shapes_the_binary(recipe, monkeypatch):
    keys = [recipe.key()]
    for change in ({"flags": ("-O2",)}, {"link": ()}, {"flavour": "cuda13"}, {"library": "other.so"}):
        keys.append(replace(recipe, **change).key())
    monkeypatch.setenv("FASTLORA_CXXFLAGS", "-g")
    keys.append(recipe.key())
    for path in (*recipe.sources, *recipe.headers):
        path.write_text(path.read_text() + " ")
        keys.append(recipe.key())
    assert len(set(keys)) == len(keys)
    assert recipe.key() == keys[-1]


def test_another_compiler_builds_another_entry(recipe, monkeypatch):
    first = _jit.build(recipe)
    newer = _jit.Compiler(("c++",), "c++ 99")
    monkeypatch.setattr(_jit, "find_compiler", lambda: newer)
    assert list(_jit.find(recipe, newer)) == []
    assert _jit.build(recipe) != first and first.exists()


def test_a_damaged_entry_is_built_again(recipe):
    library = _jit.build(recipe)
    library.write_text("sou")  # what a full disk or a lost power supply leaves
    assert list(_jit.find(recipe, COMPILER)) == []
    assert _jit.build(recipe) == library and library.read_text() == "source"


def test_force_replaces_the_entry(recipe):
    library = _jit.build(recipe)
    mapped = library.open()
    before = library.stat().st_ino
    assert _jit.build(recipe, force=True) == library and library.stat().st_ino != before
    assert mapped.read() == "source"  # who has it loaded keeps it
    mapped.close()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks(recipe, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert _jit.build(recipe).read_text() == "source"


def test_without_locks_the_first_of_two_builds_stays(recipe, monkeypatch):
    rival = []

    def compile_late(recipe: _jit.Recipe, compiler: _jit.Compiler, directory: Path) -> None:
        slow.compile(recipe, compiler, directory)
        rival.append(
            _jit._build_in(directory.parent, rivals_place, slow, compiler, force=False).stat().st_ino
        )

    slow = recipe
    rivals_place = Path(os.environ["FASTLORA_CACHE"]) / ".build-rival"
    rivals_place.mkdir(parents=True)
    late = replace(recipe, compile=compile_late)
    assert _jit.build(late).stat().st_ino == rival[0]


def test_libraries_of_others_are_not_loaded(recipe, monkeypatch):
    library = _jit.build(recipe)
    assert list(_jit.find(recipe, COMPILER)) == [library]
    for directory in (library.parent, library.parent.parent):
        directory.chmod(0o777)
        assert list(_jit.find(recipe, COMPILER)) == []
        directory.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: library.stat().st_uid + 1)
    if library.stat().st_uid:
        assert list(_jit.find(recipe, COMPILER)) == []
        assert "belongs to another user" in (_cache.distrust(library.parent) or "")
    else:
        assert list(_jit.find(recipe, COMPILER)) == [library]  # root's


def test_a_directory_of_another_user_is_not_used(recipe):
    cache = Path(os.environ["FASTLORA_CACHE"])
    cache.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a directory away")
    os.chown(cache, 65534, 65534)
    assert _jit.build(recipe).parent.parent == _cache.cache_dirs()[1]


def test_a_link_in_a_shared_directory_is_not_followed(recipe, tmp_path):
    tmp_path.chmod(0o1777)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / f"pyfastlora-{os.getuid()}").symlink_to(tmp_path / "mine")
    Path(os.environ["FASTLORA_CACHE"]).write_text("")
    with pytest.raises(_jit.BuildError, match="is a link in a directory where anybody can make one"):
        _jit.build(recipe)


def test_cache_directories(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _cache.cache_dirs()[0] == tmp_path / ".cache" / "pyfastlora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _cache.cache_dirs()[0] == tmp_path / "xdg" / "pyfastlora"
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "named"))
    assert _cache.cache_dirs()[0] == tmp_path / "named"


def test_a_library_that_does_not_load_says_so(recipe):
    def load(library: Path) -> None:
        raise OSError("undefined symbol: aoti_torch_new")

    with pytest.raises(
        _jit.BuildError, match=r"does not load: undefined symbol.*run `fastlora build --force`"
    ):
        _jit.obtain(recipe, load)


def test_prebuilt_comes_first_and_needs_no_compiler(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(_jit, "PREBUILT", tmp_path / "prebuilt")
    library = _jit.build_into(_jit.PREBUILT, recipe)
    _jit.build(recipe)
    monkeypatch.setattr(_jit, "find_compiler", lambda: None)
    assert _jit.obtain(recipe, lambda found: found) == library
    recipe.sources[0].write_text("changed since")
    with pytest.raises(_jit.BuildError, match=r"no C\+\+ compiler"):
        _jit.obtain(recipe, lambda found: found)
