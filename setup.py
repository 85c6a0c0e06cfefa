"""What pyproject.toml cannot say: the list of packages, and the wheel that has the libraries compiled.

`pip install .` compiles nothing and needs no torch: the first use compiles. With FASTLORA_AOT=1,
`pip install --no-build-isolation .` compiles for the torch and the Python that are installed beside it.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class CompiledBuild(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout is compiled by its first use, for its sources change
        sys.path.insert(0, str(Path(__file__).parent))
        from pyfastlora import _jit, host
        from pyfastlora.ops import _native, _native_gpu

        recipes = [_native.recipe(), host.recipe()]
        if os.environ.get("FASTLORA_ARCHS"):  # named, as the machine that builds wheels need not have a GPU
            recipes.append(_native_gpu.recipe(_native_gpu.wanted_archs()))
        for recipe in recipes:
            _jit.build_into(Path(self.build_lib, "pyfastlora", "_prebuilt").absolute(), recipe)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # No Python version: the kernels use none of its symbols, and another Python finds no host module
        # under its own suffix and builds it.
        return "py3", "none", super().get_tag()[2]


class CompiledDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # a wheel for this platform, built in a directory of its own


packages = [
    *find_packages(include=["pyfastlora", "pyfastlora.*"]),
    "pyfastlora.csrc",
    "pyfastlora.examples",
    "pyfastlora.kernels_triton",
]

if os.environ.get("FASTLORA_AOT") == "1":
    commands = {"build_py": CompiledBuild, "bdist_wheel": PlatformWheel}
    setup(packages=packages, distclass=CompiledDistribution, cmdclass=commands)
else:
    setup(packages=packages)
