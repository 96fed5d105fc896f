"""From rows of a source to tokens in place: what a worker of the loader does.

A source of cells is `TokenRows` (a token store) or `MatrixRows` (a matrix, to be tokenised). The
loader asks it for a *part*, the rows that a window takes from it, and a worker then has
`Part.write` read, decode and tokenise them into the window's memory.

- The lengths of a token store's cells are known beforehand, so its tokens go from the decoder
  into the window in one step. A matrix's entries are decoded into buffers that each worker keeps
  for its next window (fresh memory costs a page fault per 4 KB, about a tenth of the decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..io.chunks.gathering import EntryChunks, Shared, buffer
from ..io.interfaces import Chunks
from ..io.sources.matrices import RowReader
from ..preprocessing.tokens import Tokenized


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

    def part(self, rows: np.ndarray) -> Part:
        """The ``rows``, int64 [cells].

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

    def part(self, rows: np.ndarray) -> Part:
        return _TokenPart(self, rows, [array.share(rows) for array in self._arrays])

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


class MatrixRows:
    """The cells of a matrix, to be tokenised.

    Parameters
    ----------
    reader
        Reads them; closed with this.
    types
        Of the genes and values that are made.
    tokenizing
        `tokens.tokenize`, with all that it needs to know besides the cells.
    """

    def __init__(
        self,
        reader: RowReader,
        types: tuple[np.dtype[Any], np.dtype[Any]],
        tokenizing: Callable[..., Tokenized],
    ) -> None:
        self.offsets, self.types = reader.offsets, types
        self.entry_bytes, self.fixed_bytes = reader.entry_bytes, reader.fixed_bytes
        self._reader, self._tokenizing = reader, tokenizing

    def part(self, rows: np.ndarray) -> Part:
        return _MatrixPart(self._reader, self._tokenizing, rows)

    def close(self) -> None:
        self._reader.close()


class _MatrixPart:
    def __init__(
        self, reader: RowReader, tokenizing: Callable[..., Tokenized], rows: np.ndarray
    ) -> None:
        self._reader, self._tokenizing, self._rows = reader, tokenizing, rows
        self._shared = reader.share(rows)

    def write(self, genes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, order = np.unique(self._rows, return_inverse=True)
        block = self._reader.read(rows, self._shared, buffer)
        tokenized = self._tokenizing(block, order=order, into=(genes, values))
        return np.diff(tokenized.offsets), tokenized.unknown
