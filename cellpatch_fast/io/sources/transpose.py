"""From columns to rows: a CSC matrix as a CSR matrix, in bounded memory.

A cell's entries are scattered over a whole CSC file, so rows can only be had by reordering all
of it. What fits the memory limit is reordered in memory by scipy. More than that goes through
an external bucket sort: count the entries of each cell; cut the cells into buckets that can be
sorted in memory; stream the columns once, appending each entry to its bucket's place in a
temporary file; sort each bucket there. The outcome is an ordinary CSR matrix whose indices and
data are temporary files, so it is streamed like any other, any number of times.

Both ways keep the order of columns within a cell, so their results are identical. The temporary
files have no name: they are gone when closed, even if the process is killed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...devices import usable_cores
from ...errors import InputError, summary
from ..chunks import chunks_of
from ..chunks.gathering import EntryChunks
from ..interfaces import StoredArray
from .matrices import CsrMatrix, RowReader, check_indices, plan_blocks, signed_indices

MEMORY_LIMIT = 512 * 2**20
BUCKET_CELLS = 65_536  # a cell's position in its bucket fits uint16


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
        return self.data.dtype

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
    def _memory_entries(self) -> int:
        """Entries that can be sorted at once: the sort needs up to 96 bytes for each."""
        return max(1, self._memory_limit // 96)


def _sort_in_memory(columns: CscMatrix) -> CsrMatrix:
    from scipy import sparse

    with _reading(columns, columns.indices, columns.data) as read:
        indices, data = read(0, columns.entries)
    check_indices(indices, columns.shape[0], columns.name, "cell", columns.indptr, 0)
    # scipy moves the values only; seen as integers, every dtype is one that it knows
    bits = data.view(f"u{data.dtype.itemsize}")
    parts = (bits, signed_indices(indices), columns.indptr)
    rows = sparse.csc_array(parts, shape=columns.shape).tocsr()
    indptr = rows.indptr.astype(np.int64)
    return CsrMatrix(columns.name, columns.shape, indptr, rows.indices, rows.data.view(data.dtype))


def _sort_on_disk(columns: CscMatrix) -> CsrMatrix:
    dtypes = (np.dtype(np.uint16), np.dtype(np.int32), columns.dtype)
    _check_disk(columns.name, columns.entries * sum(dtype.itemsize for dtype in dtypes))
    indptr = _count_cells(columns)
    buckets = list(_bucket_bounds(indptr, columns._memory_entries))
    rows, genes, values = (TemporaryArray(columns.entries, dtype) for dtype in dtypes)
    try:
        _scatter(columns, indptr, buckets, rows, genes, values)
        _sort_buckets(indptr, buckets, rows, genes, values)
    except BaseException as error:
        genes.close()
        values.close()
        if isinstance(error, OSError):
            raise InputError(
                f"{columns.name}: cannot write its temporary copy by cells ({summary(error)}). "
                f"{_disk_advice()}"
            ) from error
        raise
    finally:
        rows.close()
    return CsrMatrix(columns.name, columns.shape, indptr, genes, values)


def _bucket_bounds(indptr: np.ndarray, entries: int) -> Iterator[tuple[int, int]]:
    """Runs of up to `BUCKET_CELLS` cells with so many entries."""
    for start, stop in plan_blocks(indptr, 0, len(indptr) - 1, entries):
        for first in range(start, stop, BUCKET_CELLS):
            yield first, min(first + BUCKET_CELLS, stop)


def _sort_buckets(
    indptr: np.ndarray,
    buckets: list[tuple[int, int]],
    rows: TemporaryArray,
    genes: TemporaryArray,
    values: TemporaryArray,
) -> None:
    """Order the entries of each bucket by cell; within a cell they are in order already."""
    for start, stop in buckets:
        first, last = int(indptr[start]), int(indptr[stop])
        order = np.argsort(rows.take(first, last), kind="stable")
        genes.write(first, genes.take(first, last)[order])
        values.write(first, values.take(first, last)[order])


def _count_cells(columns: CscMatrix) -> np.ndarray:
    """int64 [cells + 1]: where the entries of each cell will start."""
    cells = columns.shape[0]
    counts = np.zeros(cells, np.int64)
    with _reading(columns, columns.indices) as read:
        for first, last, offsets, gene in _pieces(columns):
            (piece,) = read(first, last)
            check_indices(piece, cells, columns.name, "cell", offsets, gene)
            counts += np.bincount(signed_indices(piece), minlength=cells)
    return np.concatenate([[0], np.cumsum(counts)])


def _scatter(
    columns: CscMatrix,
    indptr: np.ndarray,
    buckets: list[tuple[int, int]],
    rows: TemporaryArray,
    genes: TemporaryArray,
    values: TemporaryArray,
) -> None:
    """Append every entry to its bucket, which has the place of its cells' entries."""
    starts = np.array([start for start, _ in buckets])
    sizes = [stop - start for start, stop in buckets]
    # a narrow type is what makes the stable sort below a radix sort
    kind = np.uint16 if len(buckets) <= 2**16 else np.uint32
    bucket_of_cell = np.repeat(np.arange(len(buckets), dtype=kind), sizes)
    cursors = indptr[starts]
    with _reading(columns, columns.indices, columns.data) as read:
        for first, last, offsets, gene in _pieces(columns):
            indices, data = read(first, last)
            cells = signed_indices(indices)
            bucket = bucket_of_cell[cells]
            order = np.argsort(bucket, kind="stable")
            piece_rows = (cells - starts[bucket])[order].astype(np.uint16)
            piece_genes = np.arange(gene, gene + len(offsets) - 1, dtype=np.int32)
            piece_genes = np.repeat(piece_genes, np.diff(offsets))[order]
            piece_values = data[order]
            counts = np.bincount(bucket, minlength=len(buckets))
            ends = np.cumsum(counts)
            for which in np.flatnonzero(counts):
                part = slice(ends[which] - counts[which], ends[which])
                rows.write(cursors[which], piece_rows[part])
                genes.write(cursors[which], piece_genes[part])
                values.write(cursors[which], piece_values[part])
            cursors += counts


def _pieces(columns: CscMatrix) -> Iterator[tuple[int, int, np.ndarray, int]]:
    """Runs of entries as long as memory allows: first, last, offsets of the columns in it
    (clipped to it), first column. One column may be longer than a piece."""
    size = columns._memory_entries
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
        entries = [
            EntryChunks(columns.name, columns.indptr, chunks_of(array), owner="gene")
            for array in arrays
        ]
        for array in entries:
            stack.callback(array.close)
        workers = stack.enter_context(ThreadPoolExecutor(usable_cores()))
        yield lambda first, last: [array.read(first, last, workers) for array in entries]


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
