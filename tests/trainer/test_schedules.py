"""Schedules of the learning rate against torch's and transformers' own and closed forms; their keys."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from pyfastlora.trainer.schedules import factor

from .test_config import GOOD
from .test_resume import run

STEPS, WARMUP = 20, 6


def rates(load, text: str, warmup: int = WARMUP) -> list[float]:
    at = factor(load(GOOD + text).config, warmup, STEPS)
    return [at(step) for step in range(STEPS)]


def theirs(make) -> list[float]:
    """The factors of a scheduler of a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("div", [25, 7])
def test_one_cycle_is_torchs(load, div):
    wanted = theirs(
        lambda o: OneCycleLR(
            *(o, 1.0, STEPS, None, None, WARMUP / STEPS, "cos", False, 0, 0, div, 1e4)
        )
    )
    text = f"lr_scheduler: one_cycle\nlr_div_factor: {div}\nwarmup_steps: {WARMUP}\n"
    assert rates(load, text) == pytest.approx(wanted, rel=1e-9)
    # without a warm-up, torch's own share of the steps rises
    assert rates(load, text.replace(f"warmup_steps: {WARMUP}\n", ""), 0) == pytest.approx(wanted, rel=1e-9)


def test_cosine_with_a_least_rate_is_that_of_transformers(load):
    wanted = theirs(
        lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, min_lr_rate=0.2)
    )
    assert rates(load, "cosine_min_lr_ratio: 0.2\n") == pytest.approx(wanted, rel=1e-9)


def test_cosine_that_is_constant_at_the_end(load):
    found = rates(load, "cosine_min_lr_ratio: 0.2\ncosine_constant_lr_ratio: 0.7\n")
    assert found[WARMUP] == 1 and found[14:] == pytest.approx([0.2] * 6)
    half = WARMUP + (14 - WARMUP) // 2
    assert found[half] == pytest.approx(0.6)
    assert all(a > b for a, b in zip(found[WARMUP:14], found[WARMUP + 1 : 15], strict=True))


def test_quadratic_warm_up(load):
    found = rates(load, "lr_quadratic_warmup: true\n")
    assert found[:WARMUP] == pytest.approx([(n / WARMUP) ** 2 for n in range(WARMUP)])
    assert found[WARMUP + 7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_rex(load):
    found = rates(load, "lr_scheduler: rex\n")
    shares = [n / (STEPS - WARMUP) for n in range(STEPS - WARMUP)]
    assert found[WARMUP:] == pytest.approx([(1 - p) / (1 - p / 2) for p in shares])
    assert found[:WARMUP] == pytest.approx([n / WARMUP for n in range(WARMUP)])


def test_log_sweep(load):
    text = "lr_scheduler: log_sweep\nlog_sweep_min_lr: 1e-6\nlog_sweep_max_lr: 1e-2\n"
    rate = load(GOOD + text).config.learning_rate
    found = [f * rate for f in rates(load, text, 0)]
    assert found[0] == pytest.approx(1e-6) and found[-1] == pytest.approx(1e-2)
    ratios = [b / a for a, b in itertools.pairwise(found)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_a_run_follows_it(write_jsonl, alpaca_rows, config_file, tmp_path):
    config = config_file(write_jsonl(alpaca_rows), "warmup_steps: 2\nlr_quadratic_warmup: true\n")
    run(config, "--set", "lr_scheduler=cosine")
    lines = [json.loads(line) for line in Path(tmp_path, "out", "log.jsonl").read_text().splitlines()]
    found = [line["learning_rate"] for line in lines if line["event"] == "train"]
    wanted = [0, 0.25, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    assert found == pytest.approx([1e-2 * w for w in wanted])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr_scheduler: reduce_lr_on_plateau\n", "lr_scheduler: reduce_lr_on_plateau follows evaluations"),
        ("lr_scheduler: one_cicle\n", "did you mean one_cycle?"),
        ("lr_div_factor: 10\n", "lr_div_factor goes with lr_scheduler: one_cycle; got lr_scheduler: cosine"),
        ("cosine_constant_lr_ratio: 0.8\n", "constant at which rate? set cosine_min_lr_ratio"),
        ("lr_scheduler: rex\nlr_scheduler_kwargs: {a: 1}\n", "this one has keys of its own"),
        ("lr_scheduler: log_sweep\nwarmup_steps: 5\n", "log_sweep rises from its first step on"),
        ("lr_scheduler: constant\nlr_scheduler_kwargs: {a: 1}\n", "constant has no arguments"),
        ("lr_scheduler: constant\nwarmup_ratio: 0.1\n", "has no warm-up; say constant_with_warmup"),
    ],
)
def test_keys_that_do_not_fit(mistakes, text, sentence):
    assert sentence in "\n".join(mistakes(GOOD + text))
