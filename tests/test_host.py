"""The host module: compiled and Python versions agree, and what is not known is not guessed."""

import numpy as np
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


SAMPLES = {
    "none": [],
    "one": [7],
    "exact": [16] * 5,
    "halves": [8] * 7,
    "ones": [1] * 100,
    "mixed": [3, 16, 9, 1, 7, 7, 12, 4, 15, 2, 5, 5, 11],
}


def packed(name, *arguments):
    if name == "compiled" and host.compiled() is None:
        pytest.skip(f"host module: {host.why_not()}")
    run = host.best_fit_reference if name == "reference" else host.compiled().best_fit
    return run(*arguments)


def by_definition(lengths, capacity, most):
    """Best-fit decreasing, looked up in a list of all rows."""
    rows, room, turn, documents = [0] * len(lengths), [], [], []
    for now, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [r for r in range(len(room)) if room[r] >= lengths[i] and documents[r] != most]
        if not fitting:
            room.append(capacity), turn.append(0), documents.append(0)
            fitting = [len(room) - 1]
        row = min(fitting, key=lambda r: (room[r], -turn[r]))
        rows[i], turn[row] = row, now
        room[row] -= lengths[i]
        documents[row] += 1
    return rows


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("case", SAMPLES)
def test_best_fit_is_what_its_definition_says(name, case, most):
    lengths = np.array(SAMPLES[case], np.int64)
    assert packed(name, lengths, 16, most).tolist() == by_definition(SAMPLES[case], 16, most)


@pytest.mark.parametrize("capacity", [63, 64, 65, 4096, 4097, 300_000])
def test_both_versions_pack_alike(capacity):
    random = np.random.default_rng(capacity)
    for seed in range(5):
        drawn = random.integers(1, capacity + 1, 500) if seed % 2 else random.geometric(8 / capacity, 500)
        lengths = np.minimum(drawn, capacity).astype(np.int64)
        for most in (0, 4):
            rows = packed("compiled", lengths, capacity, most)
            assert np.array_equal(rows, packed("reference", lengths, capacity, most))
            assert np.bincount(rows, weights=lengths).max() <= capacity
            assert not most or np.bincount(rows).max() <= most


@pytest.mark.parametrize("capacity", [2048, 8192])
@pytest.mark.parametrize("mean", [360, None], ids=["lognormal", "uniform"])
def test_rows_are_full(mean, capacity):
    """Beside what no packing can beat: all tokens, and a row for each of the samples over half a row.

    Drawn evenly up to the capacity, long samples find no short one left to go with; so it is 99.85 % there.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(8, capacity + 1, 1_000_000)
    if mean is not None:
        lengths = np.clip(random.lognormal(np.log(mean) - 0.5, 1.0, 1_000_000), 8, capacity).astype(np.int64)
    rows = host.best_fit(lengths, capacity).max() + 1
    bound = max(-(-lengths.sum() // capacity), (lengths > capacity // 2).sum())
    assert bound / rows >= (0.999 if mean else 0.9985)
    assert mean is None or lengths.sum() / (rows * capacity) >= 0.999


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([0, 3], "from 1 to capacity 8; got 0 to 3"), ([9], "got 9 to 9"), ([1.5], "got float64 .1.")],
)
def test_lengths_that_cannot_be_packed(lengths, said):
    with pytest.raises(ValueError, match=said):
        host.best_fit(np.array(lengths), 8)
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        host.best_fit(np.array([], np.int64), 0)
