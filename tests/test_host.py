"""The host module: compiled and Python versions agree, and what is not known is not guessed."""

import pytest

from pyfastlora import host


def test_cpu_features_agree_with_the_kernel_of_the_system():
    if host.compiled() is None:
        pytest.skip(f"host module: {host.why_not()}")
    if not (said := host.cpu_features_reference()):
        pytest.skip("the system does not list the features of this CPU")
    assert host.cpu_features() == said and set(said) == set(host.X86_FEATURES)


def test_cpu_features_without_the_compiled_module(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2 fma avx512_bf16\nbugs\t\t: none\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = host.cpu_features_reference(str(cpuinfo))
    assert {name for name, present in found.items() if present} == {"avx2", "fma", "avx512_bf16"}
    assert host.cpu_features_reference(str(tmp_path / "none")) == {}  # not known is not the same as absent
    monkeypatch.setattr(host, "compiled", lambda: None)
    assert host.cpu_features() == host.cpu_features_reference()
