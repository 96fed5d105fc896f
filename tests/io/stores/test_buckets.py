"""Cells in another order through files: as in memory, whatever the sizes, resumable anywhere."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast import RaggedCells
from cellpatch_fast.io.stores.buckets import Buckets, bytes_needed
from cellpatch_fast.io.stores.tokens import gene_dtype, narrowed, value_dtype

from .token_files import CONTINUOUS, DISCRETE, VOCABULARY, make_cells


def open_buckets(folder: Path, rows: np.ndarray, cells: RaggedCells, **sizes: Any) -> Buckets:
    dtypes = cells.genes.numpy().dtype, cells.values.numpy().dtype
    return Buckets(folder, rows, cells.entries, *dtypes, **sizes)


def fill(buckets: Buckets, cells: RaggedCells, stop: int, step: int = 3) -> None:
    """Append the cells up to ``stop``, one unknown entry each."""
    while buckets.next_cell < stop:
        batch = cells.slice(buckets.next_cell, min(buckets.next_cell + step, stop))
        buckets.append(batch, len(batch))


def assert_same(found: RaggedCells, expected: RaggedCells) -> None:
    assert np.array_equal(found.offsets.numpy(), expected.offsets.numpy())
    assert np.array_equal(found.genes.numpy(), expected.genes.numpy())
    assert np.array_equal(found.values.numpy(), expected.values.numpy())
    assert found.values.dtype == expected.values.dtype


def in_order(cells: RaggedCells, rows: np.ndarray) -> RaggedCells:
    return cells.take(torch.from_numpy(np.argsort(rows)))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    bucket_bytes=st.integers(1, 400),
    gathered_bytes=st.integers(1, 200),
    checkpoint_bytes=st.integers(1, 300),
    discrete=st.booleans(),
    data=st.data(),
)
def test_cells_arrive_in_their_rows(
    lengths: list[int], discrete: bool, data: st.DataObject, **sizes: Any
) -> None:
    """Interrupted on the way in and on the way out."""
    preprocessing = DISCRETE if discrete else CONTINUOUS
    cells = narrowed(make_cells(lengths, preprocessing), VOCABULARY.size, preprocessing, 0)
    rows = np.random.default_rng(len(lengths)).permutation(len(lengths))
    with TemporaryDirectory() as name:
        folder = Path(name) / "buckets"
        fill(open_buckets(folder, rows, cells, **sizes), cells, data.draw(cells_of(lengths)))
        buckets = open_buckets(folder, rows, cells, **sizes)
        assert buckets.unknown_entries == buckets.next_cell
        fill(buckets, cells, len(cells))
        buckets.finish()
        assert buckets.is_complete
        first = data.draw(cells_of(lengths))
        buckets = open_buckets(folder, rows, cells, **sizes)
        assert (buckets.next_cell, buckets.unknown_entries) == (len(cells), len(cells))
        parts = list(buckets.read(first))
        expected = in_order(cells, rows).slice(first, len(cells))
        assert_same(RaggedCells.concatenate([expected.slice(0, 0), *parts]), expected)


def cells_of(lengths: list[int]) -> st.SearchStrategy[int]:
    return st.integers(0, len(lengths))


def test_files_take_what_was_said_and_go_when_they_are_forgotten(tmp_path: Path) -> None:
    cells = make_cells([11] * 50)
    rows = np.random.default_rng(0).permutation(50)
    buckets = open_buckets(tmp_path, rows, cells, bucket_bytes=151)
    fill(buckets, cells, 50)
    buckets.finish()
    files = {path for path in tmp_path.iterdir() if path.name.isdecimal()}
    types = gene_dtype(VOCABULARY.size), value_dtype(DISCRETE)
    content = sum(path.stat().st_size for path in files) - 16 * len(files)  # a piece's numbers
    assert content == bytes_needed(50, 550, *types) == 50 * (8 + 11 * 3)
    assert len(files) == 17  # of 3 cells
    buckets.forget(8)
    assert {path for path in tmp_path.iterdir() if path.name.isdecimal()} == files - {
        tmp_path / "0",
        tmp_path / "1",
    }
    parts = RaggedCells.concatenate(list(buckets.read(6)))
    assert_same(parts, in_order(cells, rows).slice(6, 50))
