"""A pytest plugin: PEFT's own tests, of LoRA, with every model patched as soon as it has its adapters.

FASTLORA_PEFT_SUITE          "patched" or "plain" (PEFT alone)
FASTLORA_PEFT_SUITE_SHARD    "0/2": the first of two parts
FASTLORA_PEFT_SUITE_ONLY     a JSON list of tests; without it all that are of interest
FASTLORA_PEFT_SUITE_RESULTS  where a JSON object goes: the outcome of each test, and what ran fused
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

OUTCOMES: dict[str, str] = {}
REASONS: dict[str, str] = {}
#: Fused regions that ran, by sort, and the tests in which at least one did.
CALLS = {"linears": 0, "groups": 0, "blocks": 0, "embeddings": 0, "tests": 0}

_LORA = re.compile(r"(?<![A-Za-z])LoraConfig")
_OTHER_METHODS = re.compile(
    r"AdaLora|Adamss|Beft|C3A|DeLoRA|Delora|Frod|GraLoRA|Hira|Hra|Lily|Lokr|Miss|Peanut|PromptTuning|Psoft|Road|"
    r"Shadow|Supertuning|TinyLora|VBLora|Vera|WaveFT|IA3|Kappa|prompt|prefix|PROMPT|LOHA|LOKR"
)


def _wanted(nodeid: str) -> bool:
    """Tests of LoRA: those parametrised with its config, and those that name no other method."""
    name = nodeid.partition("::")[2]
    return bool(_LORA.search(name)) or not ("Config-" in name or _OTHER_METHODS.search(name))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, os.environ["FASTLORA_PEFT_SUITE_SHARD"].split("/"))
    only = os.environ.get("FASTLORA_PEFT_SUITE_ONLY")
    names = set(json.loads(Path(only).read_text())) if only else None
    kept, left = [], []
    for item in items:
        (kept if (_wanted(item.nodeid) if names is None else item.nodeid in names) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept[shard::shards]
    # `hub_online_once` goes online for an id it has not seen; what is not in the cache has to fail at once
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = _Everything()


class _Everything(dict):  # type: ignore[type-arg]
    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 1


def pytest_configure(config: pytest.Config) -> None:
    if os.environ["FASTLORA_PEFT_SUITE"] == "patched":
        _patch_what_gets_adapters()


def _patch_what_gets_adapters() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    import pyfastlora
    from pyfastlora.patching import layers, layers_embedding, mlp

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)  # in which get_peft_model, add_adapter, load_adapter and the others all end
    def inject_and_patch(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = inject(self, model, *args, **kwargs)
        pyfastlora.patch(model)
        return found

    BaseTuner.inject_adapter = inject_and_patch
    _count(layers, "fused_projections", lambda _, all_: "linears" if len(all_) == 1 else "groups")
    _count(mlp, "fused_mlp", lambda *_: "blocks")
    _count(layers_embedding, "fused_embedding", lambda *_: "embeddings")


def _count(module: Any, name: str, sort: Callable[..., str]) -> None:
    fused = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[sort(*args)] += 1
        return fused(*args, **kwargs)

    setattr(module, name, counted)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws numbers of its own, whatever ran before: the same with us and without us."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = dict(CALLS)
    try:
        return (yield)
    finally:
        CALLS["tests"] += before != CALLS


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(crash.message if crash else report.longrepr).strip().splitlines()[0]
        REASONS[report.nodeid] = said[:100].rstrip()


def pytest_sessionfinish() -> None:
    found = {"outcomes": OUTCOMES, "reasons": REASONS, "calls": CALLS}
    Path(os.environ["FASTLORA_PEFT_SUITE_RESULTS"]).write_text(json.dumps(found))
