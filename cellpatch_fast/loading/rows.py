"""From rows of a source to tokens in place: what a worker of the loader does.

A source of cells is one of `TokenRows` (a token store), `CsrRows` or `DenseRows` (a matrix, to be
tokenised). The loader asks it for a *part*, the rows that a window takes from it, and a worker
then has `Part.write` read, decode and tokenise them into the window's memory.

- The lengths of a token store's cells are known beforehand, so its tokens go from the decoder
  into the window in one step. A matrix's entries are decoded into buffers that each worker keeps
  for its next window (fresh memory costs a page fault per 4 KB, about a tenth of the decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..cells import CellBlock
from ..config import Preprocessing
from ..io.chunks import chunks_of
from ..io.interfaces import Chunks
from ..io.sources.matrices import CsrMatrix, DenseMatrix, dense_to_csr, numbers
from ..preprocessing.changes import Expectation
from ..preprocessing.detection import InputKind
from ..preprocessing.tokens import Tokenized, token_types, tokenize
from .gathering import EntryChunks, Shared, buffer


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
        self._arrays = [EntryChunks(name, offsets, chunks) for chunks in (genes, values)]
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
    tokens, preprocessing, kind, vocabulary_size, name, gene_names, expectation
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
        expectation: Expectation | None,
    ) -> None:
        self.offsets = matrix.indptr
        self.types = token_types(preprocessing, vocabulary_size)
        self._settings = (tokens, preprocessing, kind, vocabulary_size, name, gene_names)
        self._expectation = expectation
        self._arrays = [
            EntryChunks(matrix.name, matrix.indptr, chunks_of(array))
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
            buffer(name, int(indptr[-1]), array.chunks.dtype)
            for name, array in zip(("columns", "values"), self._arrays, strict=True)
        )
        for array, target, shares in zip(self._arrays, (columns, values), shared, strict=True):
            array.gather(rows, indptr[:-1], target, shares)
        return CellBlock(0, indptr, columns, numbers(values), rows)  # tokenize takes any columns

    def tokenize(
        self, block: CellBlock, order: np.ndarray, into: tuple[np.ndarray, np.ndarray]
    ) -> Tokenized:
        return tokenize(
            block, *self._settings, order=order, into=into, expectation=self._expectation
        )

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
    tokens, preprocessing, kind, vocabulary_size, name, gene_names, expectation
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
        expectation: Expectation | None,
    ) -> None:
        cells, self._genes = matrix.shape
        self.offsets = np.arange(cells + 1, dtype=np.int64) * self._genes
        self.types = token_types(preprocessing, vocabulary_size)
        self._settings = (tokens, preprocessing, kind, vocabulary_size, name, gene_names)
        self._expectation = expectation
        self._arrays = [EntryChunks(matrix.name, self.offsets, chunks_of(matrix.array))]
        # If no value is 0: the values, their places, columns, and copies of both.
        self.entry_bytes = 2 * self._arrays[0].chunks.dtype.itemsize + 8 + 8 + 12
        self.fixed_bytes = self._arrays[0].chunk_bytes

    def read(self, rows: np.ndarray, shared: Sequence[Shared]) -> CellBlock:
        (array,) = self._arrays
        dense = buffer("dense", len(rows) * self._genes, array.chunks.dtype)
        array.gather(rows, np.arange(len(rows)) * self._genes, dense, shared[0])
        indptr, indices, data = dense_to_csr(dense.reshape(len(rows), self._genes))
        return CellBlock(0, indptr, indices, data, rows)
