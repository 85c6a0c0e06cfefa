"""Tensors that the library makes name their device.

Where they do not they are made on the CPU, or on torch's default device: the tests of ops and regions, which
set that one, would not see it.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("pyfastlora/ops", "pyfastlora/weights", "pyfastlora/fused", "pyfastlora/patching", "kernels_triton")
MAKERS = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "zeros",
}


def without_device(source: str) -> list[int]:
    """Lines of calls such as torch.empty(..) that name no device, but those of functions called cpu."""
    found = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("cpu"):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            lists = node.args and isinstance(node.args[0], ast.List | ast.Tuple | ast.ListComp | ast.Name)
            makes = called.removeprefix("torch.") in MAKERS or (called == "torch.tensor" and lists)
            if (
                called.startswith("torch.")
                and makes
                and not {"device", None} & {word.arg for word in node.keywords}
            ):
                found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(source))
    return found


def test_every_tensor_has_a_device():
    files = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
    assert len(files) > 30
    lines = {str(path.relative_to(ROOT)): without_device(path.read_text()) for path in files}
    assert not {name: found for name, found in lines.items() if found}


def test_the_search_finds():
    source = """
def cpu(x):
    return torch.empty(3)
def gpu(x):
    a = torch.empty(3, device=x.device) + torch.zeros(2, **like)
    b = torch.zeros(3, dtype=torch.float32)
    return torch.tensor([1, 2]), torch.tensor(1 / 127), torch.empty_like(x), np.zeros(3)
"""
    assert without_device(source) == [6, 7]
