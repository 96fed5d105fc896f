"""The benchmarks' modules, as the tests of them see them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `bench` is not installed


@pytest.fixture(scope="module")
def peers() -> SimpleNamespace:
    """The models of the comparison.

    The root is on the path, so that `kernels` can be found there by those who look for a package of
    that name.
    """
    names = [
        *("bert", "flash_cellpatch", "ours", "padded", "registry"),
        *("scbert", "scfoundation", "scgpt", "tosica", "uce"),
    ]
    return SimpleNamespace(
        **{name: importlib.import_module(f"bench.peers.{name}") for name in names}
    )
