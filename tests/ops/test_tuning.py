"""Launch configurations: which entry is taken, what `fastlora tune` searches, writes and says."""

import json
import math
import subprocess
import sys

import pytest
import torch
from accuracy import DEVICE, FLOATS, implementations, name_of
from click.testing import CliRunner

pytest.importorskip("triton", reason="needs Triton: pip install pyfastlora[triton]")

import pyfastlora
from pyfastlora.cli.main import main
from pyfastlora.kernels_triton import _tuning
from pyfastlora.ops import _tune, all_ops, backend

ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100", "")
SHIPPED = json.loads(_tuning.SHIPPED.read_text())
SIZES = {
    "dequant_4bit": 1,
    "lora_backward": 1,
    "dora_grad": 1,
    "dora_norm": 2,
    "lora_expand": 2,
    "lora_grad": 2,
    "lora_shrink": 2,
}
SIZES["matmul_4bit"] = 1


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    _tuning.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    _tuning.forget()


def write(cache, version=pyfastlora.__version__, **ops):
    (cache / _tuning.FILE).write_text(json.dumps({"format": _tuning.FORMAT, version: ops}))
    _tuning.forget()


@pytest.mark.parametrize("op", sorted(_tune.VALUES))
def test_there_is_a_configuration_for_everything(op, cache):
    for arch in ARCHS:
        for dtype in FLOATS:
            for size in (16, 128, 1 << 20):
                found = _tuning.entry(op, arch, name_of(dtype), *[size] * SIZES.get(op, 0))
                assert found.keys() - {"num_stages"} == _tune.VALUES[op].keys() - {"num_stages"}


def test_every_op_with_triton_kernels_can_be_tuned():
    named = {op.name for op in all_ops() if any(each.name == "triton" for each in op.implementations)}
    assert named == _tune.VALUES.keys() == SHIPPED.keys() - {"format"}


def test_bounds_are_powers_of_two_as_sizes_are_rounded_up_to_those():
    for op in SHIPPED.keys() - {"format"}:
        for by_dtype in SHIPPED[op].values():
            for by_bounds in by_dtype.values():
                for bound in ",".join(by_bounds).split(","):
                    assert bound == "*" or math.log2(int(bound)).is_integer()
    assert [_tuning.bucket(size) for size in (0, 1, 16, 17, 4096, 4097)] == [16, 16, 16, 32, 4096, 8192]


def test_the_most_particular_entry_is_taken(cache):
    def entry(number):
        return {"BLOCK": number}

    _tuning._tables[:] = [
        {
            "op": {
                "*": {"*": {"*": entry(0)}},
                "cuda": {"*": {"*": entry(1), "64,*": entry(2), "64,16": entry(3), "128,16": entry(4)}},
                "sm_90": {"*": {"*": entry(5)}, "float32": {"256": entry(6)}},
            }
        }
    ]
    taken = [
        _tuning.entry("op", *asked)["BLOCK"]
        for asked in (
            ("gfx942", "bfloat16", 64, 16),
            ("sm_80", "bfloat16", 512, 16),
            ("sm_80", "bfloat16", 64, 32),
            ("sm_80", "bfloat16", 64, 16),
            ("sm_80", "bfloat16", 128, 16),
            ("sm_90", "bfloat16", 64, 16),
            ("sm_90", "float32", 256, 16),
            ("sm_90", "float32", 512, 16),
        )
    ]
    assert taken == [0, 1, 2, 3, 4, 5, 6, 5]
    with pytest.raises(KeyError, match="no configuration for sm_90, bfloat16"):
        _tuning.entry("another", "sm_90", "bfloat16")


def test_the_users_table_comes_first_unless_it_cannot_be_trusted(cache, caplog):
    mine = {"cuda": {"*": {"*": {"BLOCK": 64, "num_warps": 4}}}}

    def taken():
        return _tuning.entry("glu_forward", "sm_90", "bfloat16")["BLOCK"]

    shipped = taken()
    write(cache, glu_forward=mine)
    assert taken() == 64 != shipped
    cache.chmod(0o777)
    _tuning.forget()
    assert taken() == shipped
    cache.chmod(0o700)
    (cache / _tuning.FILE).write_text(json.dumps({"format": 0, "glu_forward": mine}))
    _tuning.forget()
    assert taken() == shipped and "of another version; run `fastlora tune` again" in caplog.text
    (cache / _tuning.FILE).write_text("{")
    _tuning.forget()
    assert taken() == shipped and "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("version", "entry", "said"),
    [
        ("0.0.9", {"BLOCK": 64, "num_warps": 4}, f"by 0.0.9, and this is {pyfastlora.__version__}"),
        (pyfastlora.__version__, {"BLOCK_T": 64, "num_warps": 4}, "has other settings for glu_forward"),
        (pyfastlora.__version__, {"BLOCK": "64", "num_warps": 4}, "has other settings for glu_forward"),
    ],
)
def test_what_another_version_found_is_ignored_with_a_warning(cache, caplog, version, entry, said):
    shipped = _tuning.entry("glu_forward", "sm_90", "bfloat16")
    write(cache, version, glu_forward={"cuda": {"*": {"*": entry}}}, op={"cuda": {}})
    for _ in range(2):
        assert _tuning.entry("glu_forward", "sm_90", "bfloat16") == shipped
        _tuning.forget()
    assert caplog.text.count(said) == 1
    if version != pyfastlora.__version__:  # what it found stays there, for that version
        found = _tune.Finding("dora_grad", "bfloat16", "*", SHIPPED["dora_grad"]["*"]["*"]["*"], 1.0, 0.5)
        kept = json.loads(_tune.write(found, "sm_90").read_text())
        assert kept[version]["glu_forward"] and kept[pyfastlora.__version__].keys() == {"dora_grad"}


def test_a_launch_is_configured_once(cache):
    x = torch.empty(1, device=DEVICE)
    _tuning.force({"op": {"BLOCK": 8, "programs": 3}})
    meta, programs = _tuning.config("op", x, 100)
    assert (meta, programs) == ({"BLOCK": 8}, 3)
    meta["BLOCK"] = 1  # the caller's own
    assert _tuning.config("op", x, 128) == ({"BLOCK": 8}, 3)
    assert _tuning.asked() == [("op", "float32", (128,))]
    _tuning.force({})


# ---- tuning ----


def test_the_search_descends_past_what_does_not_run():
    values = {"a": (1, 2, 3, 4), "b": (10, 20, 30)}
    timed = []

    def seconds(configs):
        timed.extend(configs)
        return [
            math.inf if c["a"] == 2 else abs(c["a"] - 3) + abs(c["b"] - 30) / 10 + (c["a"] == 1) + 1
            for c in configs
        ]

    best, before, after = _tune.search({"a": 1, "b": 10, "kept": 7}, values, seconds)
    assert best == {"a": 3, "b": 30, "kept": 7} and (before, after) == (6, 1)
    assert all(config["kept"] == 7 for config in timed)


def test_noise_changes_nothing():
    start = {"a": 1}
    assert _tune.search(start, {"a": (1, 2)}, lambda configs: [1.0, 0.99]) == (start, 1.0, 1.0)


def test_findings_are_written_beside_earlier_ones_and_read(cache):
    first = _tune.Finding("glu_forward", "bfloat16", "*", {"BLOCK": 64, "num_warps": 2}, 1.0, 0.5)
    config = SHIPPED["lora_grad"]["*"]["*"]["*"] | {"programs": 5}
    second = _tune.Finding("lora_grad", "float32", "512,16", config, 1.0, 0.5)
    assert _tune.write(first, "sm_90") == _tune.write(second, "sm_90") == cache / _tuning.FILE
    assert _tuning.entry("glu_forward", "sm_90", "bfloat16") == first.config
    assert _tuning.entry("glu_forward", "sm_80", "bfloat16") != first.config
    assert _tuning.entry("lora_grad", "sm_90", "float32", 512, 16) == second.config
    assert _tuning.entry("lora_grad", "sm_90", "float32", 1024, 16) != second.config
    assert [path.name for path in cache.iterdir()] == [_tuning.FILE]


LAUNCHES = pytest.mark.skipif(
    "triton" not in implementations("glu_forward"), reason="needs a GPU or Triton's interpreter"
)


@LAUNCHES
@pytest.mark.parametrize("op", sorted(_tune.VALUES))
def test_what_is_timed_asks_triton_for_the_configuration_of_its_op(op):
    _tuning.forget()
    with backend("triton"):
        _tune.subject(op, _tune.Shape(3, 64, 32, 5), torch.float32, DEVICE)()
    assert op in [asked for asked, _, _ in _tuning.asked()]


@LAUNCHES
def test_one_finding_for_the_shapes_that_triton_is_configured_alike_for(monkeypatch, cache):
    widest = {"lora_shrink": "BLOCK_I", "glu_forward": "BLOCK"}

    class Timer:
        def __init__(self, op, call, device):
            self.key = widest[op]

        def __call__(self, configs):
            return [1 / config[self.key] for config in configs]

    monkeypatch.setattr(_tune, "Timer", Timer)
    shapes = [_tune.Shape(3, 64, 32, 5), _tune.Shape(16, 64, 32, 16), _tune.Shape(17, 64, 32, 5)]
    found = list(_tune.tune(list(widest), shapes, [torch.float32], DEVICE))
    assert [(each.op, each.bounds) for each in found] == [
        ("lora_shrink", "16,16"),
        ("lora_shrink", "32,16"),
        ("glu_forward", "*"),
    ]
    for each in found:
        key = widest[each.op]
        assert each.config[key] == max(_tune.VALUES[each.op][key]) and each.after < each.before
        assert each.config.keys() == _tuning.entry(each.op, "", "float32", 16, 16).keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "glu"], "Invalid value for --ops: 'glu': choose from dequant_4bit, "),
        (["--shapes", "512x4096"], "Invalid value for --shapes: '512x4096' is not tokens x inputs x outputs"),
        (["--ranks", "r"], "Invalid value for --ranks: 'r' is no rank, such as 16"),
        (["--ranks", ""], "Invalid value for --ranks: names nothing"),
        (["--dtypes", "int8"], "Invalid value for --dtypes: 'int8': choose from float16, bfloat16, float32"),
    ],
)
def test_mistyped_options(arguments, said):
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code == 2 and said in result.output


def test_without_a_gpu_it_says_so():
    code = "from pyfastlora.cli.main import main; main(['tune'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "Error: tune needs a GPU, and torch sees none here\n" and not done.stdout
