"""Which module may import which, and what is loaded when. Breaks by one import upwards or at the top."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyfastlora
from pyfastlora.cli.main import VERBS

PACKAGE = Path(pyfastlora.__file__).parent
FLOORS = ("kernels_triton", "ops", "weights", "fused", "patching", "auto", "trainer", "cli")
BELOW = ("_cache", "_jit", "host")  # modules under every floor
ALLOWED_FOR_HELP = {"click", "pyfastlora"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in ("pyfastlora", *parts) if part != "__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module of this package that `name` imports, at its top or inside a function."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target.startswith("pyfastlora."))


def floor(name: str) -> int:
    room = name.split(".")[1]
    if room in pyfastlora._HOME:  # a name of the façade counts as the module it comes from
        return floor(pyfastlora._HOME[room])
    return -1 if room in BELOW or room.startswith("__") else FLOORS.index(room)


def test_imports_go_down_only():
    every = modules()
    assert len(every) > 30, "the walk found too few modules to mean anything"
    upward = [
        f"{name} imports {target}"
        for name, path in every.items()
        if name != "pyfastlora"  # the façade, which loads from every floor, late
        for target in imports(name, path)
        if floor(target) > floor(name)
    ]
    assert not upward


def test_an_upward_import_is_seen(tmp_path):
    path = tmp_path / "glu.py"
    path.write_text("def f():\n    from ..patching import patch\n    import pyfastlora.cli.main\n")
    assert [floor(target) for target in imports("pyfastlora.ops.glu", path)] == [4, 7]


def test_data_code_reaches_no_kernel():
    every = modules()
    reached = {
        name for name in every if name.startswith(("pyfastlora.trainer.data", "pyfastlora.trainer.packing"))
    }
    assert reached
    frontier = set(reached)
    while frontier:
        named = {target for name in frontier for target in imports(name, every[name])}
        known = {target if target in every else target.rpartition(".")[0] for target in named}
        frontier = (known & every.keys()) - reached
        reached |= frontier
    kernels = ("pyfastlora.ops", "pyfastlora.weights", "pyfastlora.fused", "pyfastlora.patching")
    assert not [name for name in reached if name.startswith(kernels)]


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level names outside the standard library that running `code` adds to sys.modules."""
    script = (
        "import json, sys\nbefore = set(sys.modules)\n"
        f"try:\n    exec({code!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)


def test_the_package_imports_nothing():
    assert loaded_by("import pyfastlora; dir(pyfastlora)") == {"pyfastlora"}


def test_names_of_the_package_load_on_use():
    for name in pyfastlora.__all__:
        assert getattr(pyfastlora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pacth'"):
        pyfastlora.pacth  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_loads_click_only(arguments):
    assert loaded_by("from pyfastlora.cli.main import main; main()", *arguments) <= ALLOWED_FOR_HELP


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_agrees_with_the_verbs(verb):
    """The list is written down apart from the commands, so that printing it loads none."""
    import click

    from pyfastlora.cli.main import main

    command = main.get_command(click.Context(main), verb)
    assert command is not None and command.name == verb
    assert command.get_short_help_str(limit=100) == VERBS[verb]
