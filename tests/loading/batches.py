"""Batches of the loader, and what it may leave behind, for tests."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import numpy as np
import torch

from cellpatch_fast import CellPatch, RaggedCells
from cellpatch_fast.loading import CellBatch, CellLoader


def loading_threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("cellpatch-load")]


def open_files(part: str) -> set[str]:
    """Open files that have ``part`` in their path."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {name for name in found if part in name}


def load(inputs: object, model: CellPatch | None = None, **options: Any) -> list[CellBatch]:
    if model is not None:
        options |= {"vocabulary": model.vocabulary, "config": model.config}
    with CellLoader(inputs, **options) as loader:
        return list(loader)


def together(batches: list[CellBatch]) -> RaggedCells:
    return RaggedCells.concatenate([batch.cells for batch in batches])


def in_file_order(batches: list[CellBatch]) -> RaggedCells:
    rows = np.concatenate([batch.rows for batch in batches])
    return together(batches).take(torch.from_numpy(np.argsort(rows, kind="stable")))


def assert_same(found: RaggedCells, expected: RaggedCells) -> None:
    assert torch.equal(found.offsets, expected.offsets)
    assert found.genes.dtype == expected.genes.dtype
    np.testing.assert_array_equal(found.genes.numpy(), expected.genes.numpy())
    assert torch.equal(found.values, expected.values)


def assert_same_batches(found: list[CellBatch], expected: list[CellBatch]) -> None:
    for batch, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.rows, other.rows)
        np.testing.assert_array_equal(batch.entries, other.entries)
        assert_same(batch.cells, other.cells)
        assert (batch.targets is None) == (other.targets is None)
        if batch.targets is not None and other.targets is not None:
            assert_same(batch.targets, other.targets)
        assert batch.mask_counts == other.mask_counts
