"""What pyproject.toml cannot say: the list of packages."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["pyfastlora", "pyfastlora.*"]),
        "pyfastlora.csrc",
        "pyfastlora.kernels_triton",
    ]
)
