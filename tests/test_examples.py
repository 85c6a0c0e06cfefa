"""The scripts of examples/, run as their docstrings say: every layer is fused and the loss goes down."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="needs TRL: pip install pyfastlora[examples]"
)

SCRIPTS = [
    "torch_loop",
    "accelerate_loop",
    "hf_trainer",
    pytest.param("trl_sft", marks=needs_trl),
]

#: Trains, and compares DPO's reference model, which is the base with its adapter switched off, to the base.
REFERENCE = """
import sys, torch
import small, trl_dpo
trainer = trl_dpo.main(["--steps", "11", "--output", sys.argv[1]])
base, tokenizer = small.load(None)
tokens = torch.tensor([tokenizer("7+8=15")["input_ids"]])
with torch.no_grad():
    trained = trainer.model(input_ids=tokens).logits
    with trainer.model.disable_adapter():
        reference = trainer.model(input_ids=tokens).logits
    print(torch.equal(reference, base(input_ids=tokens).logits), torch.equal(trained, reference))
"""


def run(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(EXAMPLES), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(out: str) -> list[float]:
    return [float(text) for text in re.findall(r"^step \d+ loss (\S+)$", out, re.M)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_trains_fused(name: str, tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu"] if name == "accelerate_loop" else []
    out = run(tmp_path, *launcher, str(EXAMPLES / f"{name}.py"), "--steps", "11")
    first, last = losses(out)[0], losses(out)[-1]
    assert last < first - 0.3, out
    assert "fused 14 of 14 LoRA linears" in out
    if name in ("hf_trainer", "trl_sft"):
        assert (tmp_path / "outputs" / name / "adapter_model.safetensors").exists()


@needs_trl
def test_dpo_leaves_the_reference_model_alone(tmp_path: Path) -> None:
    out = run(tmp_path, "-c", REFERENCE, str(tmp_path / "out"))
    first, last = losses(out)[0], losses(out)[-1]
    assert first == pytest.approx(math.log(2), abs=1e-5)  # the policy begins as the reference
    assert last < first - 0.1
    assert "fused 14 of 14 LoRA linears" in out
    assert "adapters are disabled" in out  # the reference ran in PEFT's forward
    assert out.splitlines()[-1] == "True False"


def test_every_script_has_a_test() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {getattr(script, "values", (script,))[0] for script in SCRIPTS}
    assert scripts == tested | {"trl_dpo", "small"}
