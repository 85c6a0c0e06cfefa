"""What every verb has: help with commands to copy, completion without torch; and the examples' copies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from pyfastlora.cli.completion import VARIABLE
from pyfastlora.cli.main import VERBS, main

EXAMPLES = Path(__file__).parents[1] / "examples"


def help_of(verb: str) -> str:
    result = CliRunner().invoke(main, [verb, "--help"], prog_name="fastlora")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_commands_to_copy(verb):
    """Each is on a line of its own, and its options are the verb's."""
    text = help_of(verb)
    command = main.get_command(click.Context(main), verb)
    examples = re.findall(rf"^ +(?:.*[|=\"(] ?)?fastlora {verb}\b(.*)$", text, re.M)
    assert examples, text
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    if command.context_settings.get("ignore_unknown_options"):
        from pyfastlora.trainer.config import Config

        known |= {f"--{key}" for key in Config.model_fields}
    for example in examples:
        used = re.findall(r"(?<= )--?[a-z][\w-]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", example))
        assert {"--" + o[2:].replace("-", "_") if o not in known else o for o in used} <= known, example


def complete(*words: str) -> list[str]:
    *before, incomplete = words
    found = BashComplete(main, {}, "fastlora", VARIABLE).get_completions(before, incomplete)
    return [item.value for item in found]


def test_a_shell_completes_verbs_options_and_keys():
    assert complete("") == list(VERBS)
    assert complete("in") == [verb for verb in VERBS if verb.startswith("in")]
    assert "--weights" in complete("merge-lora", "cfg.yaml", "--we")
    assert complete("train", "cfg.yaml", "--lora-dr") == ["--lora-dropout"]
    assert complete("train", "cfg.yaml", "--lora_dr") == ["--lora-dropout"]
    assert set(complete("evaluate", "cfg.yaml", "--ba")) == {"--base", "--base-model", "--base-config"}
    assert complete("schema", "--lora") == []
    assert complete("completion", "") == ["bash", "zsh", "fish"]


def test_the_script_asks_without_torch(tmp_path):
    script = CliRunner().invoke(main, ["completion", "bash"], prog_name="fastlora").stdout
    assert f"{VARIABLE}=bash_complete" in script and "complete -o nosort -F" in script
    code = (
        "import json, sys\nfrom pyfastlora.cli.main import main\n"
        "try:\n    main(prog_name='fastlora')\n"
        "finally:\n    print(json.dumps(sorted(sys.modules)))\n"
    )
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": "fastlora train cfg.yaml --micro", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, cwd=tmp_path
    )
    *found, modules = done.stdout.splitlines()
    assert found == ["plain,--micro-batch-size"]
    assert not {"torch", "transformers", "datasets", "peft"} & set(json.loads(modules))


def test_examples_are_copied_and_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/notes.txt").write_text("mine")
    result = CliRunner().invoke(main, ["fetch-examples"])
    assert result.exit_code == 0, result.stderr
    wanted = {p.name: p.read_bytes() for p in EXAMPLES.iterdir() if p.is_file()}
    got = {p.name: p.read_bytes() for p in (tmp_path / "examples").iterdir()}
    assert got == wanted | {"notes.txt": b"mine"}
    (tmp_path / "examples/lora.yaml").write_text("changed")
    again = CliRunner().invoke(main, ["fetch-examples"])
    assert again.exit_code == 2 and "examples has README.md, " in again.stderr
    assert "already; choose another folder" in again.stderr
    assert (tmp_path / "examples/lora.yaml").read_text() == "changed"
