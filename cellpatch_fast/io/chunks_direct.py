"""Chunks read and decoded by our own code: what Zarr and HDF5 have in common.

A format says where each chunk lies and what undoes its compression (`Place`). Here the byte
ranges that adjoin are put together, read, and decoded into the caller's arrays; what is not
compressed is read straight into them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..errors import summary
from .chunks import ChunkError
from .chunks_files import Range, Ranges
from .codecs import Pipeline


class Place(NamedTuple):
    """Where a chunk is stored, and how."""

    file: str
    start: int
    stop: int | None  # the end of the file
    pipeline: Pipeline


class Wanted(NamedTuple):
    chunk: int
    place: Place
    out: np.ndarray


class DirectChunks(ABC):
    """A one-dimensional array whose chunks are found and decoded here; see `Chunks`."""

    def __init__(self, length: int, dtype: np.dtype[Any], chunk: int, files: Ranges) -> None:
        self.length, self.dtype, self.chunk, self._files = length, dtype, chunk, files

    @abstractmethod
    def place(self, chunk: int) -> str: ...

    @abstractmethod
    def _find(self, chunk: int) -> Place | None:
        """Where a chunk is stored; None if it is not, so that it holds the fill value."""

    @abstractmethod
    def _fill_value(self) -> Any: ...

    def _may_lack(self, file: str) -> bool:
        """Whether a file that is not there stands for the fill value."""
        return False

    def close(self) -> None:
        self._files.close()

    def read(self, chunks: Sequence[int], out: Sequence[np.ndarray]) -> None:
        wanted = []
        for chunk, target in zip(chunks, out, strict=True):
            try:
                place = self._find(chunk)
            except Exception as error:
                self._fail(chunk, summary(error), error)
            if place is None:
                target[...] = self._fill_value()
            else:
                wanted.append(Wanted(chunk, place, target))
        packed = []
        for run in _runs(wanted, self._files.most):
            if run[0].place.pipeline.plain and run[0].place.stop is not None:
                self._read_plain(run)
            else:
                packed.append(run)
        if packed:
            self._read_packed(packed)

    def _read_plain(self, run: list[Wanted]) -> None:
        """Read what is not compressed into the arrays that want it."""
        file, start, _, _ = run[0].place
        for chunk, place, out in run:
            # The array's last chunk can be stored whole, and only its beginning be wanted.
            stored, needed = (place.stop or 0) - place.start, out.nbytes
            if stored not in (needed, self.chunk * self.dtype.itemsize):
                self._fail(chunk, f"it holds {stored} bytes instead of {needed}")
        try:
            count = self._files.fill(file, start, [out.view(np.uint8).data for *_, out in run])
        except Exception as error:
            self._fail(run[0].chunk, summary(error), error)
        for chunk, place, out in run:
            if place.start + out.nbytes > start + count:
                self._fail(chunk, f"the file ends at byte {start + count}, inside of it")

    def _read_packed(self, runs: list[list[Wanted]]) -> None:
        """Read and decode runs of compressed chunks, one run after the other."""
        ranges = [Range(run[0].place.file, run[0].place.start, run[-1].place.stop) for run in runs]
        contents = self._files.fetch(ranges)
        for run in runs:
            try:
                content = next(contents)
            except Exception as error:
                self._fail(run[0].chunk, summary(error), error)
            first = run[0].place.start
            for chunk, place, out in run:
                if content is None:
                    if not self._may_lack(place.file):
                        self._fail(chunk, "there is no such file")
                    out[...] = self._fill_value()
                    continue
                if place.stop is not None and place.stop - first > len(content):
                    self._fail(chunk, f"the file ends at byte {first + len(content)}, inside of it")
                stop = None if place.stop is None else place.stop - first
                self._decode(chunk, place.pipeline, content[place.start - first : stop], out)

    def _decode(self, chunk: int, pipeline: Pipeline, packed: memoryview, out: np.ndarray) -> None:
        try:
            if len(out) == self.chunk:
                pipeline.decode(packed, out)
            else:  # the array ends inside the chunk, which is stored whole
                whole = np.empty(self.chunk, self.dtype)
                pipeline.decode(packed, whole)
                out[...] = whole[: len(out)]
        except Exception as error:
            self._fail(chunk, summary(error), error)

    def _fail(self, chunk: int, reason: str, error: Exception | None = None) -> NoReturn:
        if isinstance(error, MemoryError):
            raise error
        raise ChunkError(chunk, self.place(chunk), reason) from error


def _runs(wanted: Sequence[Wanted], most: int) -> list[list[Wanted]]:
    """Chunks whose bytes adjoin, together up to ``most`` bytes, and need the same decoding."""
    runs: list[list[Wanted]] = []
    file, end, limit, pipeline = None, -1, 0, None
    for item in wanted:
        place = item.place
        if (
            place.start == end
            and place.stop is not None
            and place.stop <= limit
            and place.file == file
            and place.pipeline is pipeline
        ):
            runs[-1].append(item)
        else:
            runs.append([item])
            file, pipeline, limit = place.file, place.pipeline, place.start + most
        end = -1 if place.stop is None else place.stop
    return runs
