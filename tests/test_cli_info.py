"""The command line around the trainer: `info`, `build`, and what a mistyped verb says."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pyfastlora import _jit
from pyfastlora.cli.main import VERBS, main
from pyfastlora.ops import _native, _native_gpu, all_ops


def fastlora(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from pyfastlora.cli.main import main; main(prog_name='fastlora')",
    ]
    return subprocess.run([*command, *arguments], env=os.environ | env, capture_output=True, text=True)


def table(output: str, title: str) -> dict[str, str]:
    """The rows under the section that begins with `title`."""
    lines = iter(output.splitlines())
    next(line for line in lines if line.startswith(title))
    rows = itertools.takewhile(lambda line: line.startswith("  "), lines)
    return dict(re.split(r"\s{2,}", row.strip(), maxsplit=1) for row in rows)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "Error: no verb 'trian'; did you mean `fastlora train`?"),
        ("buidl", "Error: no verb 'buidl'; did you mean `fastlora build`?"),
        (
            "xyz",
            f"Error: no verb 'xyz'; there are {', '.join(VERBS)}.",
        ),
    ],
)
def test_a_mistyped_verb(typed, said):
    result = CliRunner().invoke(main, [typed])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == said


def test_info_lists_every_op_and_what_takes_it():
    result = CliRunner().invoke(main, ["info", "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    rows = table(result.output, "ops on cpu")
    assert [name for name in rows if not name.startswith("not ")] == [op.name for op in all_ops()]
    assert all(rows[op.name].split(", ")[-1] == "reference" for op in all_ops())
    assert rows["not cpu"].startswith("has float16, bfloat16, float32; this is float64")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_info_names_every_implementation_of_every_op_and_why_it_does_not_run():
    result = CliRunner().invoke(main, ["info"])
    rows = table(result.output, "ops on cpu")
    on_the_cpu = ["cpu", "reference"] if _native.why_not() is None else ["reference"]
    for op in all_ops():
        assert [each.name for each in op.implementations] == ["gpu", "triton", "cpu", "reference"]
        assert rows[op.name].split(", ") == on_the_cpu
    assert rows["not gpu"] == rows["not triton"] == "needs GPU tensors; these are on cpu"  # for all of them
    assert rows.get("not cpu") == _native.why_not()


def test_info_in_a_dtype_the_kernels_have():
    result = CliRunner().invoke(main, ["info"])
    if _jit.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    assert table(result.output, "ops on cpu")["glu_forward"].split(", ")[-2:] == ["cpu", "reference"]
    assert table(result.output, "compiled")["cache"] == os.environ["FASTLORA_CACHE"]


def test_info_refuses_what_is_no_dtype():
    result = CliRunner().invoke(main, ["info", "--dtype", "nn"])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == (
        "Error: Invalid value for --dtype: 'nn' is no dtype of torch, such as bfloat16"
    )


def test_info_without_building(tmp_path):
    cache = tmp_path / "cache"
    done = fastlora("info", "--no-build", FASTLORA_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert "not built, and FASTLORA_JIT=0 forbids it: run `fastlora build`" in done.stdout
    assert "Building" not in done.stderr and not cache.exists()
    assert table(done.stdout, "environment")["FASTLORA_CACHE"] == str(cache)


def test_info_says_where_the_cache_is_when_it_is_not_where_asked(tmp_path):
    (tmp_path / "file").write_text("")
    done = fastlora("info", "--no-build", FASTLORA_CACHE=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    private = tmp_path / f"pyfastlora-{os.getuid()}"
    assert (
        table(done.stdout, "compiled")["cache"]
        == f"{private} (and not: {tmp_path / 'file'} is not a directory)"
    )


def test_build_says_where_and_how_long(tmp_path):
    """The real kernels are in the cache of the session; only the small host module is compiled again."""
    if _jit.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    CliRunner().invoke(main, ["build"])
    for entry in Path(os.environ["FASTLORA_CACHE"]).glob("kernels-*"):
        (tmp_path / entry.name).symlink_to(entry)
    first = fastlora("build", FASTLORA_CACHE=str(tmp_path))
    again = fastlora("build", FASTLORA_CACHE=str(tmp_path))
    assert first.returncode == again.returncode == 0, first.stderr
    kernels, host = first.stdout.splitlines()  # no GPU's, of a torch for CPUs
    assert kernels.startswith(f"kernels: {tmp_path}/kernels-") and kernels.endswith("(was there)")
    assert host.startswith(f"host-module: {tmp_path}/host-module-") and " (built in " in host
    assert [line.endswith("(was there)") for line in again.stdout.splitlines()] == [True, True]


def test_build_without_pybind11_leaves_out_what_needs_it(tmp_path, monkeypatch):
    """And nothing else: the GPU's kernels are asked for all the same."""
    if _jit.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    monkeypatch.setattr(_native_gpu, "find_toolkit", lambda hip=False: None)
    result = CliRunner().invoke(main, ["build"])
    assert result.exit_code == 0, result.output
    left_out = result.output.splitlines()[-1]
    assert left_out.startswith("host-module: left out: ") and left_out.endswith("run `pip install pybind11`")
    result = CliRunner().invoke(main, ["build", "--archs", "90"])
    assert result.output.splitlines()[-1].startswith("Error: gpu-kernels: not built: no nvcc")


def test_build_fails_with_the_compilers_words(tmp_path):
    cxx = tmp_path / "cxx"
    cxx.write_text("#!/bin/sh\necho 'no space for templates'\nexit 1\n")
    cxx.chmod(0o755)
    done = fastlora("build", FASTLORA_CACHE=str(tmp_path / "cache"), CXX=str(cxx))
    assert done.returncode == 1
    assert "no space for templates" in done.stderr and "The whole log is in " in done.stderr
    assert "Traceback" not in done.stderr
