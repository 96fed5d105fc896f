"""Cells x genes matrices that do not fit in memory, and the one way to read cells of them.

`CsrMatrix` and `DenseMatrix` are read by rows; a column-compressed (CSC) matrix is turned into
rows first, see `transpose`. Whatever the layout, a cell's entries are the same, with one freedom:
CSR files keep them in the order in which they were written, while from CSC and dense files they
come in ascending column order; a dense matrix cannot tell a stored zero from none, so zeros are
dropped.

A `RowReader` gathers any cells, in any number of threads: the loader's workers read their windows
with it, and `read_blocks` reads runs of cells for whoever looks at a matrix.

Nothing here changes a value. What is checked is what would make the arithmetic of blocks wrong:
offsets that decrease or do not fit the data, and columns that do not exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ...cells import CellBlock
from ...errors import InputError
from ..chunks import chunks_of
from ..chunks.gathering import EntryChunks, Shared
from ..interfaces import COPY_AGAIN, StoredArray

MAX_ENTRIES = 8_000_000  # of a block

Room = Callable[[str, int, np.dtype[Any]], np.ndarray]  # memory by purpose, length and type


def new_memory(purpose: str, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Memory of its own for every array that is read."""
    return np.empty(length, dtype)


class RowReader(Protocol):
    """Reads cells of a matrix, whichever are asked for."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [cells + 1]: where a cell's stored entries start; of a dense matrix every gene
        counts as one."""

    @property
    def entry_bytes(self) -> int:
        """Memory that reading needs per stored entry."""

    @property
    def fixed_bytes(self) -> int:
        """Memory that reading needs in any case."""

    def share(self, rows: np.ndarray) -> Sequence[Shared]:
        """What `read` of ``rows`` may share with the reads before and after it.

        To be called in the order of the reads, from one thread.
        """

    def read(
        self, rows: np.ndarray, shared: Sequence[Shared], room: Room = new_memory
    ) -> CellBlock:
        """The cells ``rows``, int64, ascending and each once; columns as they are stored."""

    def close(self) -> None:
        """Give back what reading has opened."""


class Matrix(Protocol):
    """Cells x genes, somewhere."""

    @property
    def name(self) -> str:
        """File and element, for messages."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, genes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""

    @property
    def entries(self) -> int | None:
        """Stored entries; None if that is unknown before reading."""

    def reader(self) -> RowReader:
        """A reader of the cells; the caller closes it."""


def read_blocks(
    matrix: Matrix, ranges: Iterable[tuple[int, int]], max_entries: int, whole: bool = True
) -> Iterator[CellBlock]:
    """The cells ``start : stop`` of each range, as blocks of up to ``max_entries`` stored entries.

    Unless the ranges are wanted ``whole``, each ends with its first block.

    Raises
    ------
    InputError
        If a chunk is damaged, or an entry has a column that does not exist.
    """
    with contextlib.closing(matrix.reader()) as reader:
        for first, last in ranges:
            blocks = plan_blocks(reader.offsets, first, last, max_entries)
            for start, stop in blocks if whole else islice(blocks, 1):
                rows = np.arange(start, stop)
                block = reader.read(rows, reader.share(rows))
                check_indices(
                    block.indices, matrix.shape[1], matrix.name, "gene", block.indptr, start
                )
                yield CellBlock(start, block.indptr, signed_indices(block.indices), block.data)


def plan_blocks(
    indptr: np.ndarray, start: int, stop: int, max_entries: int
) -> Iterator[tuple[int, int]]:
    """Cut the cells ``start : stop`` into runs with up to ``max_entries`` entries.

    A cell with more is a run of its own.
    """
    while start < stop:
        reach = int(np.searchsorted(indptr, indptr[start] + max_entries, side="right")) - 1
        end = min(max(reach, start + 1), stop)
        yield start, end
        start = end


@dataclass(frozen=True, eq=False)
class CsrMatrix:
    """A row-compressed matrix. ``indptr`` is in memory; indices and data may be on disk."""

    name: str
    shape: tuple[int, int]
    indptr: np.ndarray  # int64 [c + 1]
    indices: StoredArray | np.ndarray  # [n]
    data: StoredArray | np.ndarray  # [n]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def entries(self) -> int:
        return int(self.indptr[-1])

    def reader(self) -> CsrReader:
        return CsrReader(self)


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """A dense matrix, [cells, genes]."""

    name: str
    shape: tuple[int, int]
    array: StoredArray | np.ndarray

    entries: None = field(default=None, init=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def reader(self) -> DenseReader:
        return DenseReader(self)


class CsrReader:
    """The cells of a CSR matrix; see `RowReader`."""

    def __init__(self, matrix: CsrMatrix) -> None:
        self.offsets = matrix.indptr
        self._arrays = [
            EntryChunks(matrix.name, matrix.indptr, chunks_of(array))
            for array in (matrix.indices, matrix.data)
        ]
        stored = sum(array.chunks.dtype.itemsize for array in self._arrays)
        self.entry_bytes = stored + 12  # at most: int32 columns and float64 values made of them
        self.fixed_bytes = sum(array.chunk_bytes for array in self._arrays)

    def share(self, rows: np.ndarray) -> Sequence[Shared]:
        return [array.share(rows) for array in self._arrays]

    def read(
        self, rows: np.ndarray, shared: Sequence[Shared], room: Room = new_memory
    ) -> CellBlock:
        indptr = np.concatenate([[0], np.cumsum(self.offsets[rows + 1] - self.offsets[rows])])
        columns, values = (
            room(purpose, int(indptr[-1]), array.chunks.dtype)
            for purpose, array in zip(("columns", "values"), self._arrays, strict=True)
        )
        for array, target, shares in zip(self._arrays, (columns, values), shared, strict=True):
            array.gather(rows, indptr[:-1], target, shares)
        return CellBlock(0, indptr, columns, numbers(values), rows)

    def close(self) -> None:
        for array in self._arrays:
            array.close()


class DenseReader:
    """The cells of a dense matrix; see `RowReader`."""

    def __init__(self, matrix: DenseMatrix) -> None:
        cells, self._genes = matrix.shape
        self.offsets = np.arange(cells + 1, dtype=np.int64) * self._genes
        self._array = EntryChunks(matrix.name, self.offsets, chunks_of(matrix.array))
        # If no value is 0: the values, their places, columns, and copies of both.
        self.entry_bytes = 2 * self._array.chunks.dtype.itemsize + 8 + 8 + 12
        self.fixed_bytes = self._array.chunk_bytes

    def share(self, rows: np.ndarray) -> Sequence[Shared]:
        return [self._array.share(rows)]

    def read(
        self, rows: np.ndarray, shared: Sequence[Shared], room: Room = new_memory
    ) -> CellBlock:
        dense = room("dense", len(rows) * self._genes, self._array.chunks.dtype)
        self._array.gather(rows, np.arange(len(rows)) * self._genes, dense, shared[0])
        indptr, indices, data = dense_to_csr(dense.reshape(len(rows), self._genes))
        return CellBlock(0, indptr, indices, data, rows)

    def close(self) -> None:
        self._array.close()


def dense_to_csr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(indptr, indices, data)`` of the non-zeros of ``values`` [cells, genes]."""
    cells, genes = values.shape
    flat = np.ascontiguousarray(values).reshape(-1)
    places = np.flatnonzero(flat != 0)  # NaN is not 0, so it stays to be noticed
    row_starts = np.arange(cells + 1, dtype=np.int64) * genes
    indptr = np.searchsorted(places, row_starts).astype(np.int64, copy=False)
    indices = places - np.repeat(row_starts[:-1], np.diff(indptr))
    return indptr, indices.astype(np.int32), numbers(flat[places])


def signed_indices(indices: np.ndarray) -> np.ndarray:
    """``indices``, known to be in range, as int32 or int64; without a copy where possible."""
    if indices.dtype.kind == "u" and indices.dtype.itemsize >= 4:
        return indices.view(np.int32 if indices.dtype.itemsize == 4 else np.int64)
    return indices if indices.dtype.itemsize >= 4 else indices.astype(np.int32)


def numbers(values: np.ndarray) -> np.ndarray:
    """``values``, where truth values count as 0 and 1."""
    return values.view(np.uint8) if values.dtype == bool else values


def check_indices(
    indices: np.ndarray, size: int, name: str, noun: str, offsets: np.ndarray, begin: int
) -> None:
    """Raise `InputError` unless all ``indices`` are in ``range(size)``.

    ``noun`` says what they count, ``"gene"`` or ``"cell"``. ``offsets`` (from ``begin`` on) are
    those of the rows (or columns) that the entries belong to, for the message.
    """
    if not len(indices) or (indices.max() < size and indices.min() >= 0):
        return
    entry = int(np.flatnonzero((indices < 0) | (indices >= size))[0])
    owner = begin + int(np.searchsorted(offsets - offsets[0], entry, side="right")) - 1
    other = "cell" if noun == "gene" else "gene"
    raise InputError(
        f"{name}: {other} {owner} has an entry for {noun} {int(indices[entry])}, but there are "
        f"{noun}s 0 to {size - 1} only. {COPY_AGAIN}."
    )


def check_offsets(indptr: np.ndarray, owners: int, indices: int, data: int, name: str) -> None:
    """Raise `InputError` unless ``indptr`` cuts ``indices`` and ``data`` among ``owners``."""
    if len(indptr) != owners + 1:
        fault = f"indptr has {len(indptr)} elements; {owners} rows or columns need {owners + 1}"
    elif indptr[0] != 0:
        fault = f"indptr starts at {indptr[0]}, not at 0"
    elif (indptr[1:] < indptr[:-1]).any():
        place = int(np.flatnonzero(indptr[1:] < indptr[:-1])[0])
        fault = f"indptr decreases after position {place}"
    elif not indptr[-1] == indices == data:
        fault = f"indptr ends at {indptr[-1]}, but there are {indices} indices and {data} values"
    else:
        return
    raise InputError(f"{name}: {fault}. {COPY_AGAIN}, or have it written anew.")


def check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Raise `InputError` unless ``dtype`` holds plain numbers (or truth values)."""
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise InputError(f"{name} has dtype {dtype}. Expected integers or floating point numbers.")
