"""From columns to rows: a CSC matrix as a CSR matrix, in bounded memory.

A cell's entries are scattered over a whole CSC file, so rows can only be had by reordering all
of it. What fits the memory limit is reordered in memory by scipy. More than that is sorted through
a file, see `sorting`: count the entries of each cell, so that every bucket of cells has its place;
read the columns once, a piece at a time, and append the piece's entries, by cells, to the places
of their buckets; sort each bucket there. The outcome is an ordinary CSR matrix whose indices and
data are temporary files, so it is read like any other, any number of times.

Both ways keep the order of columns within a cell, so their results are identical. The temporary
files have no name: they are gone when closed, even if the process is killed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...devices import usable_cores
from ...errors import InputError, summary
from ..chunks import chunks_of
from ..chunks.gathering import EntryChunks
from ..interfaces import StoredArray
from ..sorting import Runs, by_bucket, by_row
from .matrices import CsrMatrix, RowReader, check_indices, plan_blocks, signed_indices

MEMORY_LIMIT = 512 * 2**20
MOST_THREADS = 8  # that decode columns: one that sorts them keeps no more busy
UINT32, COLUMN = np.dtype(np.uint32), np.dtype(np.int32)


class CscMatrix:
    """A column-compressed matrix; its first reader turns it into rows.

    Parameters
    ----------
    indptr
        int64 [genes + 1], checked.
    memory_limit
        Bytes to use for the transposition, about.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        indptr: np.ndarray,
        indices: StoredArray | np.ndarray,
        data: StoredArray | np.ndarray,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.name, self.shape, self.indptr = name, shape, indptr
        self.indices, self.data = indices, data
        self.entries = int(indptr[-1])
        self._memory_limit = memory_limit
        self._rows: CsrMatrix | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype.newbyteorder("=")

    def reader(self) -> RowReader:
        return self.rows().reader()

    def rows(self) -> CsrMatrix:
        """This matrix by rows; kept, because it is costly."""
        if self._rows is None:
            # before and after, and the index type can be up to 8 bytes
            needed = 2 * self.entries * (self.indices.dtype.itemsize + self.data.dtype.itemsize)
            small = needed <= self._memory_limit
            self._rows = _sort_in_memory(self) if small else _sort_on_disk(self)
        return self._rows

    def close(self) -> None:
        """Give back what the transposition takes."""
        for array in (self._rows.indices, self._rows.data) if self._rows else ():
            if isinstance(array, TemporaryArray):
                array.close()
        self._rows = None

    @property
    def most(self) -> int:
        """Entries that can be sorted at once: the sort needs up to 64 bytes for each."""
        return max(1, self._memory_limit // 64)


def _sort_in_memory(columns: CscMatrix) -> CsrMatrix:
    with _reading(columns, columns.indices, columns.data) as read:
        indices, data = read(0, columns.entries)
    check_indices(indices, columns.shape[0], columns.name, "cell", columns.indptr, 0)
    indptr, genes, values = _by_rows(indices, data, columns.indptr, columns.shape)
    return CsrMatrix(columns.name, columns.shape, indptr.astype(np.int64), genes, values)


def _by_rows(
    indices: np.ndarray, data: np.ndarray, offsets: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and data of a CSC matrix by rows; columns stay in order within a row."""
    from scipy import sparse

    # scipy moves the values only; seen as integers, every dtype is one that it knows
    bits = data.view(f"u{data.dtype.itemsize}")
    rows = sparse.csc_array((bits, signed_indices(indices), offsets), shape=shape).tocsr()
    return rows.indptr, rows.indices, rows.data.view(data.dtype)


def _sort_on_disk(columns: CscMatrix) -> CsrMatrix:
    entry_bytes = COLUMN.itemsize + columns.dtype.itemsize
    _check_disk(columns.name, columns.entries * entry_bytes)
    indptr, run_offsets = _count_cells(columns)
    runs = int(run_offsets[-1])
    _check_disk(columns.name, columns.entries * entry_bytes + runs * 2 * UINT32.itemsize)
    starts = np.array(
        [start for start, _ in plan_blocks(indptr, 0, columns.shape[0], columns.most)]
    )
    bounds = np.append(starts, columns.shape[0])
    buckets = _Buckets(
        starts=starts,
        runs=TemporaryArray(2 * runs, UINT32),
        columns=TemporaryArray(columns.entries, COLUMN),
        values=TemporaryArray(columns.entries, columns.dtype),
        run_bounds=run_offsets[bounds],
        entry_bounds=indptr[bounds],
    )
    try:
        _scatter(columns, buckets)
        buckets.sort()
    except BaseException as error:
        buckets.columns.close()
        buckets.values.close()
        if isinstance(error, OSError):
            raise InputError(
                f"{columns.name}: cannot write its temporary copy by cells ({summary(error)}). "
                f"{_disk_advice()}"
            ) from error
        raise
    finally:
        buckets.runs.close()
    return CsrMatrix(columns.name, columns.shape, indptr, buckets.columns, buckets.values)


@dataclass(frozen=True, eq=False)
class _Buckets:
    """Runs of cells, each bucket's where the entries of its cells will be in the end.

    Parameters
    ----------
    starts
        int64 [buckets]: the first cell of each.
    runs, columns, values
        Cell (in its bucket) and length of each run, in turn; their entries.
    run_bounds, entry_bounds
        int64 [buckets + 1]: the places of each bucket's runs and entries.
    """

    starts: np.ndarray
    runs: TemporaryArray
    columns: TemporaryArray
    values: TemporaryArray
    run_bounds: np.ndarray
    entry_bounds: np.ndarray

    def append(self, bucket: int, part: Runs, run: int, entry: int) -> None:
        """Put the runs of a bucket at its places from ``run`` and ``entry`` on."""
        rows = part.rows - self.starts[bucket]
        self.runs.write(2 * run, np.stack([rows, part.lengths], axis=1).astype(UINT32).reshape(-1))
        self.columns.write(entry, part.columns)
        self.values.write(entry, part.values)

    def sort(self) -> None:
        """Order the entries of each bucket by cell."""
        for bucket in range(len(self.starts)):
            first, last = self.entry_bounds[bucket : bucket + 2]
            runs = self.runs.take(*(2 * self.run_bounds[bucket : bucket + 2]))
            ordered = by_row(
                Runs(
                    rows=runs[::2],
                    lengths=runs[1::2],
                    columns=self.columns.take(first, last),
                    values=self.values.take(first, last),
                )
            )
            self.columns.write(first, ordered.columns)
            self.values.write(first, ordered.values)


def _count_cells(columns: CscMatrix) -> tuple[np.ndarray, np.ndarray]:
    """int64 [cells + 1], twice: where the entries of each cell will start, and its runs."""
    cells = columns.shape[0]
    entries, runs = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
    with _reading(columns, columns.indices) as read:
        for first, last, offsets, gene in _pieces(columns):
            (indices,) = read(first, last)
            check_indices(indices, cells, columns.name, "cell", offsets, gene)
            counts = np.bincount(signed_indices(indices), minlength=cells)
            entries += counts
            runs += counts > 0
    return np.concatenate([[0], np.cumsum(entries)]), np.concatenate([[0], np.cumsum(runs)])


def _scatter(columns: CscMatrix, buckets: _Buckets) -> None:
    """Append the runs of every piece to their buckets."""
    next_run, next_entry = buckets.run_bounds[:-1].copy(), buckets.entry_bounds[:-1].copy()
    with _reading(columns, columns.indices, columns.data) as read:
        for first, last, offsets, gene in _pieces(columns):
            indices, data = read(first, last)
            shape = columns.shape[0], len(offsets) - 1
            indptr, genes, values = _by_rows(indices, data, offsets - first, shape)
            lengths = np.diff(indptr)
            rows = np.flatnonzero(lengths)
            runs = Runs(
                rows=rows,
                lengths=lengths[rows],
                columns=(genes + gene).astype(COLUMN, copy=False),
                values=values.astype(columns.dtype, copy=False),
            )
            bucket_of_run = np.searchsorted(buckets.starts, rows, side="right") - 1
            for bucket, part in by_bucket(runs, bucket_of_run):
                buckets.append(bucket, part, next_run[bucket], next_entry[bucket])
                next_run[bucket] += len(part.rows)
                next_entry[bucket] += len(part.columns)


def _pieces(columns: CscMatrix) -> Iterator[tuple[int, int, np.ndarray, int]]:
    """Runs of entries as long as memory allows: first, last, offsets of the columns in it
    (clipped to it), first column. One column may be longer than a piece."""
    size = columns.most
    for first in range(0, columns.entries, size):
        last = min(first + size, columns.entries)
        gene = int(np.searchsorted(columns.indptr, first, side="right")) - 1
        end = int(np.searchsorted(columns.indptr, last, side="left"))
        yield first, last, np.clip(columns.indptr[gene : end + 1], first, last), gene


@contextlib.contextmanager
def _reading(
    columns: CscMatrix, *arrays: StoredArray | np.ndarray
) -> Iterator[Callable[[int, int], list[np.ndarray]]]:
    """Gives a function that reads the entries ``first : last`` of ``arrays`` with all cores."""
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(ThreadPoolExecutor(min(usable_cores(), MOST_THREADS)))

        def reader(array: StoredArray | np.ndarray) -> Callable[[int, int], np.ndarray]:
            if isinstance(array, np.ndarray):
                return lambda first, last: array[first:last]
            entries = EntryChunks(columns.name, columns.indptr, chunks_of(array), owner="gene")
            stack.callback(entries.close)
            return lambda first, last: entries.read(first, last, workers)

        readers = [reader(array) for array in arrays]
        yield lambda first, last: [read(first, last) for read in readers]


def _check_disk(name: str, needed: int) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise InputError(
            f"{name} is stored by genes (CSC). Reordering it by cells needs {needed / 1e9:.1f} GB "
            f"in {tempfile.gettempdir()}, where {free / 1e9:.1f} GB are free. {_disk_advice()}"
        )


def _disk_advice() -> str:
    return (
        "Set the environment variable TMPDIR to a folder on a larger disk, or store the matrix "
        "by cells (CSR)."
    )


class TemporaryArray:
    """A one-dimensional array in an unnamed temporary file."""

    def __init__(self, length: int, dtype: np.dtype[Any]) -> None:
        self.shape: tuple[int, ...] = (length,)
        self.dtype = dtype
        self.chunk = 1
        self._file = tempfile.TemporaryFile(prefix="cellpatch-", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def write(self, start: int, values: np.ndarray) -> None:
        self._file.seek(int(start) * self.dtype.itemsize)
        rest = values.view(np.uint8).data
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, start: int, out: np.ndarray) -> None:
        self._file.seek(start * self.dtype.itemsize)
        rest = out.view(np.uint8).data
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise OSError(f"the temporary file ended {len(rest)} bytes early")
            rest = rest[count:]

    def take(self, first: int, last: int) -> np.ndarray:
        """The elements ``first : last`` as a new array."""
        out = np.empty(last - first, self.dtype)
        self.read(first, out)
        return out

    def chunks(self) -> None:
        """There are none."""

    def place(self, start: int) -> str:
        return f"a temporary file in {tempfile.gettempdir()}"
