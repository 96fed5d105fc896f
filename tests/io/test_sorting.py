"""Runs go through buckets into the order of their rows, whatever the buckets, and none is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellpatch_fast.io.sorting import Runs, by_bucket, by_row


def runs_of(rows: list[int], lengths: list[int], first: int, dtype: str) -> Runs:
    """Every entry is unique; its column and its value tell the same."""
    entries = np.arange(first, first + sum(lengths))
    return Runs(np.array(rows, np.int64), np.array(lengths), entries, entries.astype(dtype))


def entries_of(runs: Runs, row: int) -> list[int]:
    """The columns of a row, in order."""
    owners = np.repeat(runs.rows, runs.lengths)
    return runs.columns[owners == row].tolist()


@given(
    lots=st.lists(st.lists(st.tuples(st.integers(0, 22), st.integers(0, 5)), max_size=13)),
    bucket_rows=st.integers(1, 30),
    dtype=st.sampled_from(["uint8", "float16", "float32", "int64"]),
)
def test_a_row_gets_its_runs_in_the_order_in_which_they_come(
    lots: list[list[tuple[int, int]]], bucket_rows: int, dtype: str
) -> None:
    kept: dict[int, list[Runs]] = {}
    first = 0
    for lot in lots:
        runs = runs_of([row for row, _ in lot], [length for _, length in lot], first, dtype)
        for bucket, part in by_bucket(runs, runs.rows // bucket_rows):
            kept.setdefault(bucket, []).append(part)
        first += sum(runs.lengths)
    together = runs_of(
        [row for lot in lots for row, _ in lot],
        [length for lot in lots for _, length in lot],
        first=0,
        dtype=dtype,
    )
    entries = 0
    for bucket, parts in kept.items():
        runs = by_row(Runs(*map(np.concatenate, zip(*parts, strict=True))))
        assert set(runs.rows // bucket_rows) == {bucket}
        assert (np.diff(runs.rows) >= 0).all()
        np.testing.assert_array_equal(runs.values, runs.columns.astype(dtype))
        for row in set(runs.rows.tolist()):
            assert entries_of(runs, row) == entries_of(together, row)
        entries += len(runs.columns)
    assert entries == first


def test_runs_that_are_in_order_of_buckets_are_not_copied() -> None:
    runs = runs_of([3, 2, 7], [5, 0, 11], first=0, dtype="uint8")
    parts = [part for _, part in by_bucket(runs, runs.rows // 5)]
    assert [part.rows.tolist() for part in parts] == [[3, 2], [7]]
    for part in parts:
        assert np.shares_memory(part.values, runs.values)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_is_sorted_to_nothing(lengths: list[int]) -> None:
    runs = runs_of(list(range(len(lengths))), lengths, first=0, dtype="uint8")
    parts = list(by_bucket(runs, np.zeros(len(lengths), int)))
    assert len(parts) == bool(lengths)
    assert len(by_row(runs).columns) == 0
