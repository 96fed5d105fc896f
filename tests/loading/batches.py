"""Batches of the loader, and what it may leave behind, for tests."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellpatch_fast import CellPatch, RaggedCells
from cellpatch_fast.loading import CellBatch, CellLoader

CELLS = 211
CHUNK, SHARD_CHUNKS = 101, 7  # of the token store `originals`

Files = dict[str, Path]  # by format


def loading_threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("cellpatch-load")]


def open_files(part: str) -> set[str]:
    """Open files that have ``part`` in their path."""
    names = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            names.add(os.readlink(f"/proc/self/fd/{number}"))
    return {name for name in names if part in name}


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


def assert_same(cells: RaggedCells, expected: RaggedCells) -> None:
    assert torch.equal(cells.offsets, expected.offsets)
    assert cells.genes.dtype == expected.genes.dtype
    np.testing.assert_array_equal(cells.genes.numpy(), expected.genes.numpy())
    assert torch.equal(cells.values, expected.values)


def assert_same_batches(batches: list[CellBatch], expected: list[CellBatch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.rows, other.rows)
        np.testing.assert_array_equal(batch.entries, other.entries)
        assert_same(batch.cells, other.cells)
        assert (batch.targets is None) == (other.targets is None)
        if batch.targets is not None and other.targets is not None:
            assert_same(batch.targets, other.targets)
        assert batch.mask_counts == other.mask_counts
