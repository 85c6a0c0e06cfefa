"""`import pyfastlora.auto`: every model that PEFT makes is patched, whoever makes it and whatever came first.

Broken by a function that a trainer imported under its own name before, and by a wrapper that stays on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pyfastlora

TRAINER = """
from peft import LoraConfig, PeftModel, get_peft_model  # before or after us

def build(base, config):
    return get_peft_model(base, config)
"""

SCRIPT = """
import sys
{imports}
import torch
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
model = trainer.build(base, trainer.LoraConfig(r=2, target_modules=["0"]))
import pyfastlora
print(pyfastlora.report(model).summary())
"""

#: Shows whether PEFT would be found by us, without the seconds that importing it takes.
WAITING = """
import sys
print([type(finder).__module__ for finder in sys.meta_path].count("pyfastlora.auto"), sys.argv[1:])
"""

ORDERS = {
    "auto first": "import pyfastlora.auto, trainer",
    "auto last": "import trainer, pyfastlora.auto",
}
SAID = "pyfastlora.auto: fused 1 of 1 LoRA linears; pyfastlora.report(model) says which and why not"


def run(*arguments: str, cwd: Path, **env: str) -> tuple[str, str]:
    path = os.pathsep.join([str(cwd), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_the_order_of_imports_does_not_matter(folder: Path, imports: str) -> None:
    out, errors = run("-c", SCRIPT.format(imports=imports), cwd=folder)
    assert out == "fused 1 of 1 LoRA linears"
    assert errors.count("pyfastlora.auto: ") == 1 and SAID in errors


def test_in_front_of_a_script_and_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import pyfastlora.auto" + WAITING)
    for command in (["script.py"], ["-m", "script"]):
        out, _ = run("-m", "pyfastlora.auto", *command, "--epochs", "3", cwd=tmp_path)
        assert out == "1 ['--epochs', '3']"


def test_switched_off_by_the_environment(tmp_path: Path) -> None:
    code = "import pyfastlora.auto" + WAITING
    assert run("-c", code, cwd=tmp_path)[0] == "1 []"
    assert run("-c", code, cwd=tmp_path, FASTLORA_AUTO="0")[0] == "0 []"


def test_the_import_loads_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, pyfastlora.auto\n"
        "print([name for name in ('peft', 'torch', 'transformers') if name in sys.modules])\n"
    )
    assert run("-c", code, cwd=tmp_path)[0] == "[]"


# ---- in this process
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, switched on for one test."""
    monkeypatch.setenv("FASTLORA_AUTO", "0")
    import pyfastlora.auto as module

    monkeypatch.delenv("FASTLORA_AUTO")
    untouched = BaseTuner.inject_adapter
    module.enable()
    yield module
    module.disable()
    assert BaseTuner.inject_adapter is untouched


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def config(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets or ("0",)), init_lora_weights=False)


def fused(model: nn.Module) -> tuple[int, int]:
    report = pyfastlora.report(model)
    return report.fused, report.total


def test_adapters_from_disk(auto: ModuleType, tmp_path: Path) -> None:
    saved, x = get_peft_model(base(), config()), torch.ones(3, 8)
    saved.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, **options)
        assert fused(loaded) == (1, 1)
        assert torch.equal(loaded(x), saved(x))
        loaded.load_adapter(tmp_path, adapter_name="again")
        assert fused(loaded) == (1, 1)


def test_an_adapter_that_comes_later_brings_its_layers(auto: ModuleType) -> None:
    model = get_peft_model(base(), config("0"))
    model.add_adapter("other", config("1"))
    model.set_adapter("other")
    assert [type(layer).__name__ for layer in model.base_model.model] == ["FastLoraLinear"] * 2


def test_models_of_other_makers(auto: ModuleType) -> None:
    assert fused(inject_adapter_in_model(config(), base())) == (1, 1)
    mixed = PeftMixedModel(base(), config(), adapter_name="first")
    mixed.add_adapter("second", config("1"))
    assert fused(mixed)[1] == 2
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes))
    llama.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert fused(llama) == (1, 1)


def test_said_once_and_not_of_a_model_without_lora(
    auto: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import IA3Config

    monkeypatch.setattr(auto._seam, "announced", False)
    get_peft_model(base(), IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        get_peft_model(base(), config())
    assert capsys.readouterr().err.count(SAID) == 1


def test_only_the_first_of_many_processes_says_so(
    auto: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto._seam, "announced", False)
    monkeypatch.setenv("RANK", "1")
    assert fused(get_peft_model(base(), config())) == (1, 1)
    assert capsys.readouterr().err == ""


def test_disabled_again(auto: ModuleType) -> None:
    before = get_peft_model(base(), config())
    auto.disable()
    assert fused(get_peft_model(base(), config())) == (0, 1)
    assert fused(before) == (1, 1)
    auto.enable()
    assert fused(get_peft_model(base(), config())) == (1, 1)


def test_disabled_under_a_wrapper_of_somebody_else(auto: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = BaseTuner.inject_adapter
    BaseTuner.inject_adapter = lambda *args, **kwargs: ours(*args, **kwargs)
    auto.disable()
    assert fused(get_peft_model(base(), config())) == (0, 1)
    BaseTuner.inject_adapter = ours.__wrapped__


def test_the_class_of_the_model_is_left_alone(auto: ModuleType) -> None:
    model = base()
    get_peft_model(model, config())
    assert type(model) is nn.Sequential and type(model[1]) is nn.Linear
