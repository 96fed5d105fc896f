"""The benchmarks' modules, as the tests of them see them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers() -> Iterator[SimpleNamespace]:
    """The models of the comparison.

    The root is on the path while their tests run, so that `kernels` can be found there by those who
    look for a package of that name.
    """
    names = [
        *("bert", "flash_cellpatch", "ours", "padded", "registry"),
        *("scbert", "scfoundation", "scgpt", "tosica", "uce"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield SimpleNamespace(
            **{name: importlib.import_module(f"bench.peers.{name}") for name in names}
        )
