"""Stored arrays as chunks that many threads decode at a time.

A range of rows that crosses a chunk's border would decode that chunk twice. So whoever reads
with threads asks for whole chunks, each decoded by one thread straight into the caller's memory,
and does the cutting itself. `Chunks` is that interface; `chunks_of` gives the fastest
implementation for an array: Zarr and HDF5 chunks are read and decoded by our own code where
their codecs allow it, and everything else goes through the library it belongs to, with the same
result. There, what has no chunks of its own is cut into pieces of 65,536 elements, the size that
costs least in a token store.

Two-dimensional arrays are read as the flat sequence of their rows: cell after cell.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...devices import usable_cores
from ...errors import summary
from ..interfaces import ChunkError, Chunks, StoredArray

CHUNK = 65_536  # elements that are read together where an array has no chunks
TASK_BYTES = 2**20  # decoded by one thread at a time, so that starting it costs nothing beside
DENSE_BYTES = 512 * 2**20  # at most so much of a dense matrix is decoded at a time


class LibraryChunks:
    """Any array of one or two dimensions, read by whatever reads it anyway.

    The libraries below take one call at a time, or hold the GIL; so does this.

    Parameters
    ----------
    array
        A `StoredArray`, or an array in memory.
    """

    def __init__(self, array: StoredArray | np.ndarray) -> None:
        self._array = array
        self._columns = array.shape[1] if len(array.shape) == 2 else 1
        self.length = array.shape[0] * self._columns
        self.dtype = array.dtype.newbyteorder("=")
        rows = 1 if isinstance(array, np.ndarray) else array.chunk
        if rows == 1:
            rows = max(1, CHUNK // max(1, self._columns))
        if len(array.shape) == 2:
            row_bytes = max(1, self._columns * self.dtype.itemsize)
            rows = min(rows, max(1, DENSE_BYTES // row_bytes))
        self._rows = rows
        self.chunk = max(1, rows * self._columns)
        self._lock = threading.Lock()

    def read(self, chunks: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        for place, chunk in enumerate(map(int, chunks)):
            start = chunk * self._rows
            target = out[place * self.chunk : (place + 1) * self.chunk]
            rows = target.reshape(-1, *self._array.shape[1:])
            if isinstance(self._array, np.ndarray):
                rows[...] = self._array[start : start + len(rows)]
                continue
            try:
                with self._lock:
                    self._array.read(start, rows)
            except MemoryError:
                raise
            except Exception as error:
                raise ChunkError(chunk, self.place(chunk), summary(error)) from error

    def place(self, chunk: int) -> str:
        if isinstance(self._array, np.ndarray):
            return "memory"
        return self._array.place(chunk * self._rows)

    def close(self) -> None:
        """The array stays its owner's."""


def chunks_of(array: StoredArray | np.ndarray) -> Chunks:
    """The best way to read ``array``, of one or two dimensions, by chunks.

    The caller closes it.
    """
    direct = None if isinstance(array, np.ndarray) else array.chunks()
    return LibraryChunks(array) if direct is None else direct


def read_whole(array: StoredArray | np.ndarray) -> np.ndarray:
    """All of ``array``, of one or two dimensions, in the machine's byte order; with all cores.

    Raises
    ------
    ChunkError
        If a chunk cannot be read or decoded.
    """
    with contextlib.closing(chunks_of(array)) as chunks:
        out = np.empty(chunks.length, chunks.dtype)
        numbers = range(-(-chunks.length // chunks.chunk))
        together = max(1, TASK_BYTES // (chunks.chunk * chunks.dtype.itemsize))

        def decode(first: int) -> None:
            last = min(first + together, len(numbers))
            chunks.read(numbers[first:last], out[first * chunks.chunk : last * chunks.chunk])

        with ThreadPoolExecutor(usable_cores()) as workers:
            deque(workers.map(decode, numbers[::together]), maxlen=0)
    return out.reshape(array.shape)


def stretches(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where runs of equal ``values`` start and stop."""
    bounds = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = [0, *bounds.tolist()][: len(values)]
    yield from zip(starts, [*bounds.tolist(), len(values)], strict=False)
