"""Entries of rows, gathered from the chunks that hold them.

- A chunk is decoded straight into place where all of it is wanted in one piece, and together with
  its neighbours; otherwise beside, and what is wanted is copied out while it is in the cache.
- A chunk on the border of two windows in file order is decoded once: both windows hold the same
  `SharedChunk`, and whoever comes first decodes it.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit

from ...errors import InputError
from ..interfaces import ChunkError, Chunks, remedy
from . import stretches

BESIDE_BYTES = 1 << 23  # of chunks that are decoded beside their place at a time
PART = 1 << 18  # entries that one worker decodes at a time, about


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


class EntryChunks:
    """One stored array of a matrix, and the chunk that the next window may need again.

    Parameters
    ----------
    name
        File (and element), for messages.
    offsets
        int64 [owners + 1]: owner ``o`` has the entries ``offsets[o] : offsets[o + 1]``.
    chunks
        The array; closed with this.
    owner
        What an owner is: ``"cell"`` or ``"gene"``.
    """

    def __init__(self, name: str, offsets: np.ndarray, chunks: Chunks, owner: str = "cell") -> None:
        self._name, self._offsets, self._owner = name, offsets, owner
        self.chunks = chunks
        self._last: SharedChunk | None = None

    def close(self) -> None:
        self._last = None
        self.chunks.close()

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk; three may be there: two shared ones, and one beside its place."""
        return 3 * min(self.chunks.chunk, self.chunks.length) * self.chunks.dtype.itemsize

    def share(self, rows: np.ndarray) -> Shared:
        """The border chunks of a window that has ``rows``: none unless these are ascending.

        To be called in the order of the windows, from one thread.
        """
        if not len(rows) or (rows[1:] <= rows[:-1]).any():
            return {}
        return self.share_entries(int(self._offsets[rows[0]]), int(self._offsets[rows[-1] + 1]))

    def share_entries(self, first: int, last: int) -> Shared:
        """The border chunks of the entries ``first : last``."""
        size = self.chunks.chunk
        shared = {}
        before = self._last  # of another iteration, perhaps, which may go on meanwhile
        if before is not None and before.chunk == first // size:
            shared[before.chunk] = before
        border = last // size
        if last % size and last < self.chunks.length and last > first:
            self._last = shared.setdefault(border, SharedChunk(self.chunks, border))
        return shared

    def gather(
        self, rows: np.ndarray, places: np.ndarray, target: np.ndarray, shared: Shared
    ) -> None:
        """Copy the entries of ascending ``rows`` to where each row's place in ``target`` starts."""
        self._copy(self._offsets[rows], self._offsets[rows + 1], places, target, shared)

    def read(self, first: int, last: int, workers: Executor) -> np.ndarray:
        """The entries ``first : last``, decoded by all ``workers``; see `share` for the order."""
        out = np.empty(last - first, self.chunks.dtype)
        step = -(-PART // self.chunks.chunk) * self.chunks.chunk
        bounds = [first, *range(first // step * step + step, last, step), last]
        parts = [
            (start, out[start - first : stop - first], self.share_entries(start, stop))
            for start, stop in pairwise(bounds)
        ]

        def decode(part: tuple[int, np.ndarray, Shared]) -> None:
            start, target, shared = part
            starts, stops, places = np.array([[start], [start + len(target)], [0]])
            self._copy(starts, stops, places, target, shared)

        deque(workers.map(decode, parts), maxlen=0)
        return out

    def _copy(
        self,
        starts: np.ndarray,
        stops: np.ndarray,
        places: np.ndarray,
        target: np.ndarray,
        shared: Shared,
    ) -> None:
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
            owners = f"{low} to {high}" if high > low else str(low)
            raise InputError(
                f"{self._name}: cannot read {self._owner}s {owners}, stored in {error.place} "
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
        beside = ~whole
        for first, last in stretches(np.concatenate([[0], np.cumsum(~behind)])):
            if whole[first]:
                end = int(places[last - 1] + lengths[last - 1])
                self.chunks.read(numbers[first:last], target[int(places[first]) : end])
            elif (chunk := int(numbers[first])) in shared:
                beside[first] = False
                _copy(shared[chunk].decoded(), pieces[bounds[first] : bounds[last]], target)
        self._gather_beside(numbers[beside], pieces[np.repeat(beside, np.diff(bounds))], target)

    def _gather_beside(self, numbers: np.ndarray, pieces: np.ndarray, target: np.ndarray) -> None:
        """Copy the ``pieces`` of chunks ``numbers``, which are decoded elsewhere."""
        size, dtype = self.chunks.chunk, self.chunks.dtype
        at_once = max(1, BESIDE_BYTES // (size * dtype.itemsize))
        room = buffer("beside", min(at_once, len(numbers)) * size, dtype)
        for start in range(0, len(numbers), at_once):
            group = numbers[start : start + at_once]
            end = (len(group) - 1) * size + _size(self.chunks, int(group[-1]))
            self.chunks.read(group, room[:end])
            first, last = np.searchsorted(pieces[:, 0], [group[0], group[-1] + 1])
            part = pieces[first:last].copy()
            part[:, 1] += np.searchsorted(group, part[:, 0]) * size  # where it starts in the room
            _copy(room, part, target)


def _size(chunks: Chunks, chunk: int) -> int:
    """Elements of a chunk."""
    return min(chunks.chunk, chunks.length - chunk * chunks.chunk)


_kept = threading.local()  # the buffers of a worker; they go with it


def buffer(name: str, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Memory for ``length`` elements: the same for every window, as long as it is enough."""
    needed = length * dtype.itemsize
    kept = getattr(_kept, name, None)
    if kept is None or len(kept) < needed:
        kept = np.empty(needed + needed // 4, np.uint8)
        setattr(_kept, name, kept)
    return kept[:needed].view(dtype)


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
    count = 0
    end, next_place = -1, -1
    for row in range(len(starts)):
        start, place = starts[row], places[row]
        joined = start == end and place == next_place
        while start < stops[row]:
            number = start // chunk
            stop = min(stops[row], (number + 1) * chunk)
            if joined and count and out[count - 1, 0] == number:
                out[count - 1, 2] += stop - start
            else:
                out[count] = (number, start - number * chunk, stop - start, place)
                count += 1
            joined = False
            place += stop - start
            start = stop
        if stops[row] > starts[row]:
            end, next_place = stops[row], place
    return out[:count]


def copy_rows(
    source: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    target: np.ndarray,
    places: np.ndarray,
) -> None:
    """Copy ``source[starts[r] : stops[r]]`` to where ``places[r]`` says, for each row ``r``."""
    _copy_rows(_bits(source), starts, stops, _bits(target), places)


def _copy(source: np.ndarray, pieces: np.ndarray, target: np.ndarray) -> None:
    """Copy ``pieces`` [pieces, 4] of a source to their places."""
    starts, lengths, places = pieces[:, 1:].T.copy()
    copy_rows(source, starts, starts + lengths, target, places)


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as integers: Numba knows no float16, and compiles less for fewer types."""
    return array.view(f"u{array.dtype.itemsize}")


@njit(nogil=True, cache=True)
def _copy_rows(source: Any, starts: Any, stops: Any, target: Any, places: Any) -> None:
    for row in range(len(starts)):
        length = stops[row] - starts[row]
        here = source[starts[row] : stops[row]]
        there = target[places[row] : places[row] + length]
        for entry in range(length):  # of slices, so that the compiler makes vectors of it
            there[entry] = here[entry]
