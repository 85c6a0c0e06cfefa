"""Sources of a library with one op, registered as the real bindings register theirs: compiled in a second."""

from pathlib import Path

FILES = {
    "kernels.h": "int level();\n",
    "cpu/level.cpp": '#include "../kernels.h"\nint level() { return 1; }\n',
    "bindings.cpp": """
#include <torch/csrc/stable/library.h>
#include "kernels.h"
static int64_t cpu_level() { return level(); }
STABLE_TORCH_LIBRARY(pyfastlora, m) {
    m.def("cpu_level() -> int");
    m.impl("cpu_level", TORCH_BOX(&cpu_level));
}
""",
}


def write(csrc: Path) -> None:
    """Makes `csrc` a folder of these sources, and no others for the kernels."""
    (csrc / "cpu").mkdir(parents=True, exist_ok=True)
    for path in (*csrc.glob("cpu/*"), *csrc.glob("*.h")):
        path.unlink()
    for name, text in FILES.items():
        (csrc / name).write_text(text)
