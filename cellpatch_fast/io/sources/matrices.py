"""Cells x genes matrices that do not fit in memory, as blocks of cells in CSR form.

`CsrMatrix` and `DenseMatrix` stream; a column-compressed (CSC) matrix is turned into rows first,
see `transpose`. Whatever the layout, a block's entries are the same, with one freedom: CSR files
keep their entries in the order they were written, while from CSC and dense files they come in
ascending column order; a dense matrix cannot tell a stored zero from none, so zeros are dropped.

Nothing here changes a value. What is checked is what would make the arithmetic of blocks wrong:
offsets that decrease or do not fit the data, and columns that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...cells import CellBlock
from ...errors import InputError
from ..chunks import DENSE_BYTES
from ..interfaces import COPY_AGAIN, StoredArray
from .arrays import SequentialReader

MAX_CELLS = 65_536
MAX_ENTRIES = 8_000_000
DENSE_VALUES = 4_000_000  # values of a dense matrix that are searched for non-zeros at a time


class Matrix(Protocol):
    """Something that yields blocks of cells."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, genes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""

    @property
    def entries(self) -> int | None:
        """Stored entries; None if that is unknown before reading."""

    def blocks(
        self, start: int, stop: int, max_cells: int, max_entries: int
    ) -> Iterator[CellBlock]: ...


def plan_blocks(
    indptr: np.ndarray, start: int, stop: int, max_cells: int, max_entries: int
) -> Iterator[tuple[int, int]]:
    """Cut the cells ``start : stop`` into runs as long as both limits allow.

    A cell with more than ``max_entries`` entries is a run of its own.
    """
    while start < stop:
        reach = int(np.searchsorted(indptr, indptr[start] + max_entries, side="right")) - 1
        end = min(max(reach, start + 1), start + max_cells, stop)
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

    def blocks(
        self, start: int, stop: int, max_cells: int, max_entries: int
    ) -> Iterator[CellBlock]:
        indices = SequentialReader(self.indices, self.name, self.indptr)
        data = SequentialReader(self.data, self.name, self.indptr)
        for begin, end in plan_blocks(self.indptr, start, stop, max_cells, max_entries):
            offsets = self.indptr[begin : end + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            columns = indices.rows(first, last)
            check_indices(columns, self.shape[1], self.name, "gene", offsets, begin)
            values = numbers(data.rows(first, last))
            yield CellBlock(begin, offsets - first, signed_indices(columns), values)


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

    def blocks(
        self, start: int, stop: int, max_cells: int, max_entries: int
    ) -> Iterator[CellBlock]:
        genes = self.shape[1]
        rows_held = max(1, DENSE_BYTES // (genes * self.dtype.itemsize))
        reader = SequentialReader(self.array, self.name, most=rows_held)
        rows = max(1, min(DENSE_VALUES // genes, max_cells))
        for begin in range(start, stop, rows):
            end = min(begin + rows, stop)
            indptr, indices, data = dense_to_csr(reader.rows(begin, end))
            for first, last in plan_blocks(indptr, 0, end - begin, max_cells, max_entries):
                offsets = indptr[first : last + 1]
                entries = slice(offsets[0], offsets[-1])
                yield CellBlock(
                    begin + first, offsets - offsets[0], indices[entries], data[entries]
                )


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
        found = f"indptr has {len(indptr)} elements; {owners} rows or columns need {owners + 1}"
    elif indptr[0] != 0:
        found = f"indptr starts at {indptr[0]}, not at 0"
    elif (indptr[1:] < indptr[:-1]).any():
        place = int(np.flatnonzero(indptr[1:] < indptr[:-1])[0])
        found = f"indptr decreases after position {place}"
    elif not indptr[-1] == indices == data:
        found = f"indptr ends at {indptr[-1]}, but there are {indices} indices and {data} values"
    else:
        return
    raise InputError(f"{name}: {found}. {COPY_AGAIN}, or have it written anew.")


def check_dtype(dtype: np.dtype[Any], name: str) -> None:
    """Raise `InputError` unless ``dtype`` holds plain numbers (or truth values)."""
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise InputError(f"{name} has dtype {dtype}. Expected integers or floating point numbers.")
