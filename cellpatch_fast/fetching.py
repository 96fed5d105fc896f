"""From rows of a source to tokens in place: what a worker of the loader does.

A source of cells is one of `TokenRows` (a token store), `CsrRows` or `DenseRows` (a matrix, to be
tokenised). The loader asks it for a *part*, the rows that a window takes from it, and a worker
then has `Part.write` read, decode and tokenise them into the window's memory.

- A chunk is decoded straight into place where all of it is wanted in one piece; otherwise beside,
  and what is wanted is copied out while it is in the cache.
- A chunk on the border of two windows in file order is decoded once: both windows hold the same
  `SharedChunk`, and whoever comes first decodes it.
- The lengths of a token store's cells are known beforehand, so its tokens go from the decoder
  into the window in one step. A matrix's entries are decoded into buffers that each worker keeps
  for its next window (fresh memory costs a page fault per 4 KB, about a tenth of the decoding).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numba import njit

from .errors import InputError
from .io.arrays import remedy
from .io.chunks import ChunkError, Chunks, chunks_of, stretches
from .io.matrices import CellBlock, CsrMatrix, DenseMatrix, dense_to_csr, numbers, signed_indices
from .tokens import InputKind, Preprocessing, Tokenized, token_types, tokenize

BESIDE_BYTES = 1 << 20  # of chunks that are decoded beside their place at a time


class Part(Protocol):
    """The rows that a window takes from one source."""

    def write(self, genes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write the cells one behind the other, to the start of ``genes`` and ``values``.

        Those have room for the rows' stored entries. Returns how many entries each cell has and
        how many were left out of it, int64 [cells].
        """


class Rows(Protocol):
    """The cells of one source."""

    @property
    def offsets(self) -> np.ndarray:
        """int64 [cells + 1]: where a cell's stored entries start."""

    @property
    def types(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of the genes and values that are written."""

    @property
    def entry_bytes(self) -> int:
        """Memory that a worker needs per stored entry, beside the window's own."""

    @property
    def fixed_bytes(self) -> int:
        """Memory that a worker needs in any case."""

    def part(self, rows: np.ndarray, *, in_order: bool) -> Part:
        """The ``rows``, int64 [cells]; ``in_order`` where the next window goes on after them.

        To be called in the order of the windows, from one thread.
        """

    def close(self) -> None:
        """Give back what reading takes."""


class TokenRows:
    """The cells of a token store.

    Parameters
    ----------
    name
        Of the store, for messages.
    offsets
        int64 [cells + 1].
    genes, values
        Its entries.
    """

    entry_bytes = 0

    def __init__(self, name: str, offsets: np.ndarray, genes: Chunks, values: Chunks) -> None:
        self.offsets = offsets
        # 32 bits are int32 to the rest, as the tokens that are made of a matrix
        self.stored_genes = genes.dtype
        self.types = np.dtype(np.int32) if genes.dtype == np.uint32 else genes.dtype, values.dtype
        self._arrays = [_Array(name, offsets, chunks) for chunks in (genes, values)]
        self.fixed_bytes = sum(array.chunk_bytes for array in self._arrays)

    def part(self, rows: np.ndarray, *, in_order: bool) -> Part:
        return _TokenPart(self, rows, [array.share(rows, in_order) for array in self._arrays])

    def close(self) -> None:
        for array in self._arrays:
            array.close()


class _TokenPart:
    def __init__(self, source: TokenRows, rows: np.ndarray, shared: Sequence[Shared]) -> None:
        self._source, self._rows, self._shared = source, rows, shared

    def write(self, genes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, rows = self._source, self._rows
        lengths = source.offsets[rows + 1] - source.offsets[rows]
        places = np.cumsum(lengths) - lengths
        order = np.argsort(rows, kind="stable")  # a chunk at a time
        targets = genes.view(source.stored_genes), values
        for array, shared, target in zip(source._arrays, self._shared, targets, strict=True):
            array.gather(rows[order], places[order], target, shared)
        return lengths, np.zeros(len(rows), np.int64)


class CsrRows:
    """The cells of a CSR matrix.

    Parameters
    ----------
    matrix
        The matrix.
    tokens, preprocessing, kind, vocabulary_size, name, gene_names
        See `tokens.tokenize`.
    """

    def __init__(
        self,
        matrix: CsrMatrix,
        tokens: np.ndarray,
        preprocessing: Preprocessing,
        kind: InputKind,
        vocabulary_size: int,
        name: str,
        gene_names: Sequence[str],
    ) -> None:
        self.offsets = matrix.indptr
        self.types = token_types(preprocessing, vocabulary_size)
        self._settings = (tokens, preprocessing, kind, vocabulary_size, name, gene_names)
        self._arrays = [
            _Array(matrix.name, matrix.indptr, chunks_of(array))
            for array in (matrix.indices, matrix.data)
        ]
        stored = sum(array.chunks.dtype.itemsize for array in self._arrays)
        self.entry_bytes = stored + 12  # at most: int32 columns and float64 values made of them
        self.fixed_bytes = sum(array.chunk_bytes for array in self._arrays)

    def part(self, rows: np.ndarray, *, in_order: bool) -> Part:
        return _CsrPart(self, rows, [array.share(rows, in_order) for array in self._arrays])

    def read(self, rows: np.ndarray, shared: Sequence[Shared]) -> CellBlock:
        """The ``rows``, ascending and each once."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        columns, values = (
            _buffer(name, int(indptr[-1]), array.chunks.dtype)
            for name, array in zip(("columns", "values"), self._arrays, strict=True)
        )
        for array, target, shares in zip(self._arrays, (columns, values), shared, strict=True):
            array.gather(rows, indptr[:-1], target, shares)
        return CellBlock(0, indptr, signed_indices(columns), numbers(values), rows)

    def tokenize(
        self, block: CellBlock, order: np.ndarray, into: tuple[np.ndarray, np.ndarray]
    ) -> Tokenized:
        return tokenize(block, *self._settings, order=order, into=into)

    def close(self) -> None:
        for array in self._arrays:
            array.close()


class _CsrPart:
    def __init__(self, source: CsrRows | DenseRows, rows: np.ndarray, shared: Any) -> None:
        self._source, self._rows, self._shared = source, rows, shared

    def write(self, genes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, order = np.unique(self._rows, return_inverse=True)
        block = self._source.read(rows, self._shared)
        made = self._source.tokenize(block, order, (genes, values))
        return np.diff(made.offsets), made.unknown


class DenseRows(CsrRows):
    """The cells of a dense matrix, each of which counts as one entry per gene.

    Parameters
    ----------
    matrix
        The matrix.
    tokens, preprocessing, kind, vocabulary_size, name, gene_names
        See `tokens.tokenize`.
    """

    def __init__(
        self,
        matrix: DenseMatrix,
        tokens: np.ndarray,
        preprocessing: Preprocessing,
        kind: InputKind,
        vocabulary_size: int,
        name: str,
        gene_names: Sequence[str],
    ) -> None:
        cells, self._genes = matrix.shape
        self.offsets = np.arange(cells + 1, dtype=np.int64) * self._genes
        self.types = token_types(preprocessing, vocabulary_size)
        self._settings = (tokens, preprocessing, kind, vocabulary_size, name, gene_names)
        self._arrays = [_Array(matrix.name, self.offsets, chunks_of(matrix.array))]
        # If no value is 0: the values, their places, columns, and copies of both.
        self.entry_bytes = 2 * self._arrays[0].chunks.dtype.itemsize + 8 + 8 + 12
        self.fixed_bytes = self._arrays[0].chunk_bytes

    def read(self, rows: np.ndarray, shared: Sequence[Shared]) -> CellBlock:
        (array,) = self._arrays
        dense = _buffer("dense", len(rows) * self._genes, array.chunks.dtype)
        array.gather(rows, np.arange(len(rows)) * self._genes, dense, shared[0])
        indptr, indices, data = dense_to_csr(dense.reshape(len(rows), self._genes))
        return CellBlock(0, indptr, indices, data, rows)


class SharedChunk:
    """A chunk that two or more windows need, decoded by the first worker that comes."""

    def __init__(self, chunks: Chunks, chunk: int) -> None:
        self._chunks, self.chunk = chunks, chunk
        self._lock = threading.Lock()
        self._decoded: np.ndarray | None = None

    def decoded(self) -> np.ndarray:
        with self._lock:
            if self._decoded is None:
                decoded = np.empty(_size(self._chunks, self.chunk), self._chunks.dtype)
                self._chunks.read([self.chunk], decoded)
                self._decoded = decoded
            return self._decoded


Shared = dict[int, SharedChunk]  # by the number of the chunk


class _Array:
    """One stored array of a source, and the chunk that the next window may need again."""

    def __init__(self, name: str, offsets: np.ndarray, chunks: Chunks) -> None:
        self._name, self._offsets, self.chunks = name, offsets, chunks
        self._last: SharedChunk | None = None

    def close(self) -> None:
        self._last = None
        self.chunks.close()

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk; three may be there: two shared ones, and one beside its place."""
        return 3 * min(self.chunks.chunk, self.chunks.length) * self.chunks.dtype.itemsize

    def share(self, rows: np.ndarray, in_order: bool) -> Shared:
        """The border chunks of a window that has ``rows``."""
        if not (in_order and len(rows)):
            return {}
        size = self.chunks.chunk
        first, last = int(self._offsets[rows[0]]), int(self._offsets[rows[-1] + 1])
        shared = {}
        if self._last is not None and self._last.chunk == first // size:
            shared[self._last.chunk] = self._last
        border = last // size
        if last % size and last < self.chunks.length and last > first:
            self._last = shared.setdefault(border, SharedChunk(self.chunks, border))
        return shared

    def gather(
        self, rows: np.ndarray, places: np.ndarray, target: np.ndarray, shared: Shared
    ) -> None:
        """Copy the entries of ascending ``rows`` to where each row's place in ``target`` starts."""
        starts, stops = self._offsets[rows], self._offsets[rows + 1]
        pieces = _split(starts, stops, places, self.chunks.chunk)
        if (np.diff(pieces[:, 0]) < 0).any():  # rows that come several times
            pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
        try:
            self._gather(pieces, target, shared)
        except ChunkError as error:
            first = error.chunk * self.chunks.chunk
            last = min(first + self.chunks.chunk, self.chunks.length)
            low = int(np.searchsorted(self._offsets, first, side="right")) - 1
            high = int(np.searchsorted(self._offsets, last, side="left")) - 1
            cells = f"{low} to {high}" if high > low else str(low)
            raise InputError(
                f"{self._name}: cannot read cells {cells}, stored in {error.place} "
                f"({error.reason}). {remedy(self._name)}."
            ) from error

    def _gather(self, pieces: np.ndarray, target: np.ndarray, shared: Shared) -> None:
        """Copy ``pieces`` [pieces, 4]: chunk (ascending), start in it, length, place."""
        if not len(pieces):
            return
        bounds = np.flatnonzero(np.diff(pieces[:, 0], prepend=-1, append=-1))
        numbers, _, lengths, places = pieces[bounds[:-1]].T  # of each chunk's first piece
        size = self.chunks.chunk
        whole = (np.diff(bounds) == 1) & (
            lengths == np.minimum(size, self.chunks.length - numbers * size)
        )
        whole &= ~np.isin(numbers, list(shared))
        # Whole chunks that come to lie one behind the other are read at once.
        behind = whole[1:] & whole[:-1] & (places[1:] == places[:-1] + lengths[:-1])
        beside: list[int] = []
        for first, last in stretches(np.concatenate([[0], np.cumsum(~behind)])):
            place, chunk = int(places[first]), int(numbers[first])
            if whole[first]:
                end = int(places[last - 1] + lengths[last - 1])
                self.chunks.read(numbers[first:last], target[place:end])
            elif chunk in shared:
                _copy(shared[chunk].decoded(), pieces[bounds[first] : bounds[last]], target)
            else:
                beside.append(first)
        chosen = np.array(beside, np.int64)
        self._gather_beside(numbers[chosen], bounds[chosen], bounds[chosen + 1], pieces, target)

    def _gather_beside(
        self,
        numbers: np.ndarray,
        firsts: np.ndarray,
        lasts: np.ndarray,
        pieces: np.ndarray,
        target: np.ndarray,
    ) -> None:
        """Copy the pieces ``firsts : lasts`` of each of some chunks."""
        size, dtype = self.chunks.chunk, self.chunks.dtype
        at_once = max(1, BESIDE_BYTES // (size * dtype.itemsize))
        buffer = _buffer("beside", min(at_once, len(numbers)) * size, dtype)
        for start in range(0, len(numbers), at_once):
            group = numbers[start : start + at_once]
            end = (len(group) - 1) * size + _size(self.chunks, int(group[-1]))
            self.chunks.read(group, buffer[:end])
            for place in range(len(group)):
                own = slice(firsts[start + place], lasts[start + place])
                _copy(buffer[place * size : (place + 1) * size], pieces[own], target)


def _size(chunks: Chunks, chunk: int) -> int:
    """Elements of a chunk."""
    return min(chunks.chunk, chunks.length - chunk * chunks.chunk)


_kept = threading.local()  # the buffers of a worker; they go with it


def _buffer(name: str, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Memory for ``length`` elements: the same for every window, as long as it is enough."""
    needed = length * dtype.itemsize
    buffer = getattr(_kept, name, None)
    if buffer is None or len(buffer) < needed:
        buffer = np.empty(needed + needed // 4, np.uint8)
        setattr(_kept, name, buffer)
    return buffer[:needed].view(dtype)


@njit(nogil=True, cache=True)
def _split(starts: Any, stops: Any, places: Any, chunk: int) -> Any:
    """int64 [pieces, 4] of rows ``starts : stops`` of an array, each to its place.

    A piece lies in one chunk and says which, where it starts there, its length and its place.
    Rows that follow each other in both places are joined.
    """
    pieces = 0
    for row in range(len(starts)):
        if stops[row] > starts[row]:
            pieces += (stops[row] - 1) // chunk - starts[row] // chunk + 1
    out = np.empty((pieces, 4), np.int64)
    made = 0
    end, next_place = -1, -1
    for row in range(len(starts)):
        start, place = starts[row], places[row]
        joined = start == end and place == next_place
        while start < stops[row]:
            number = start // chunk
            stop = min(stops[row], (number + 1) * chunk)
            if joined and made and out[made - 1, 0] == number:
                out[made - 1, 2] += stop - start
            else:
                out[made] = (number, start - number * chunk, stop - start, place)
                made += 1
            joined = False
            place += stop - start
            start = stop
        if stops[row] > starts[row]:
            end, next_place = stops[row], place
    return out[:made]


@njit(nogil=True, cache=True)
def copy_rows(source: Any, starts: Any, stops: Any, target: Any, places: Any) -> None:
    """Copy ``source[starts[r] : stops[r]]`` to where ``places[r]`` says, for each row ``r``."""
    for row in range(len(starts)):
        length = stops[row] - starts[row]
        target[places[row] : places[row] + length] = source[starts[row] : stops[row]]


@njit(nogil=True, cache=True)
def _copy(source: Any, pieces: Any, target: Any) -> None:
    for piece in range(len(pieces)):
        start, length, place = pieces[piece, 1], pieces[piece, 2], pieces[piece, 3]
        target[place : place + length] = source[start : start + length]


__all__ = ["CsrRows", "DenseRows", "Part", "Rows", "TokenRows", "copy_rows"]
