"""Maps the top-level folder ``kernels`` to the package ``cellpatch_fast.kernels``.

A top-level package called ``kernels`` would collide with another project's; everything else is
in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cellpatch_fast*"]),
        "cellpatch_fast.kernels",
        *(f"cellpatch_fast.kernels.{package}" for package in find_packages("kernels")),
    ],
    package_dir={"cellpatch_fast.kernels": "kernels"},
)
