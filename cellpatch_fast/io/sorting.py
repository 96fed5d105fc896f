"""The external sort: entries come in one order and are needed in another, which memory cannot hold.

Entries come in *runs*, each of which belongs to a row; the rows are cut into buckets that can be
sorted in memory. Whatever has come is split by bucket (`by_bucket`) and appended to what its bucket
has, wherever that is kept: so it is written in long stretches, whatever the order. In the end each
bucket is read and put in the order of its rows (`by_row`). Runs of one row stay in the order in
which they came, so a row may come in parts.

Who sorts says where buckets are kept: `sources.transpose` in a temporary file, `stores.buckets` in
files that outlive a killed process.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numba import njit


class Runs(NamedTuple):
    """Runs of entries, one behind the other."""

    rows: np.ndarray  # integers [runs]: where each belongs
    lengths: np.ndarray  # integers [runs]
    columns: np.ndarray  # [entries]
    values: np.ndarray  # [entries]


def by_bucket(runs: Runs, buckets: np.ndarray) -> Iterator[tuple[int, Runs]]:
    """The runs of each bucket that has any; ``buckets``, integers [runs], says which has which."""
    if (buckets[1:] < buckets[:-1]).any():
        order = np.argsort(buckets, kind="stable")
        runs, buckets = _in_order(runs, order), buckets[order]
    offsets = _offsets(runs.lengths)
    bounds = np.flatnonzero(np.diff(buckets, prepend=-1, append=-1))
    for first, last in pairwise(bounds.tolist()):
        entries = slice(offsets[first], offsets[last])
        yield (
            int(buckets[first]),
            Runs(
                rows=runs.rows[first:last],
                lengths=runs.lengths[first:last],
                columns=runs.columns[entries],
                values=runs.values[entries],
            ),
        )


def by_row(runs: Runs) -> Runs:
    """All runs in the order of their rows."""
    return _in_order(runs, np.argsort(runs.rows, kind="stable"))


def _in_order(runs: Runs, order: np.ndarray) -> Runs:
    """The runs ``order``, int64 [runs], in that order."""
    lengths = runs.lengths[order]
    bounds = _offsets(runs.lengths)[:-1][order], _offsets(lengths)
    columns, values = np.empty_like(runs.columns), np.empty_like(runs.values)
    for array, target in ((runs.columns, columns), (runs.values, values)):
        bits = f"u{array.itemsize}"  # Numba knows no float16, and compiles less for fewer types
        _copy_runs(array.view(bits), *bounds, target.view(bits))
    return Runs(runs.rows[order], lengths, columns, values)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """int64 [runs + 1]: where each run starts."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@njit(nogil=True, cache=True)
def _copy_runs(entries: Any, starts: Any, to_offsets: Any, to_entries: Any) -> None:
    """Copy each run from where it starts to where ``to_offsets`` says."""
    for run in range(len(starts)):
        start, target = starts[run], to_entries[to_offsets[run] : to_offsets[run + 1]]
        source = entries[start : start + len(target)]
        for entry in range(len(target)):  # of slices, so that the compiler makes vectors of it
            target[entry] = source[entry]
