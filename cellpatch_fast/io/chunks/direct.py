"""Chunks read and decoded by our own code: what Zarr and HDF5 have in common.

A format says where chunks lie and what undoes their compression (`Located`). Here the byte ranges
that adjoin are put together, read, and decoded to where the caller wants them; what is not
compressed is read straight there.

A token store's chunk decodes in some 80 µs, so what Python does for each chunk, while it holds the
GIL, decides how many threads are of use. Hence everything is done for as many chunks as possible
at once: places are arrays, and Blosc's chunks are decoded by one call per run of bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ...errors import summary
from ..interfaces import ChunkError
from .blosc_compiled import decompressor, summer, unpack_blosc
from .codecs import Pipeline
from .files import Range, Ranges

FILE_END = -1  # where a chunk ends, if that is where its file ends


class Located(NamedTuple):
    """Some of the chunks that were asked for, one after the other, in one file.

    ``first`` is the place of the first one among those asked for, ``starts`` and ``stops`` are
    int64 [chunks], the bytes of each.
    """

    first: int
    file: str
    starts: np.ndarray
    stops: np.ndarray
    pipeline: Pipeline

    def part(self, start: int, stop: int) -> Located:
        """The chunks ``start : stop`` of these."""
        return self._replace(
            first=self.first + start, starts=self.starts[start:stop], stops=self.stops[start:stop]
        )


class DirectChunks(ABC):
    """A one-dimensional array whose chunks are found and decoded here; see `Chunks`."""

    def __init__(self, length: int, dtype: np.dtype[Any], chunk: int, files: Ranges) -> None:
        self.length, self.dtype, self.chunk, self._files = length, dtype, chunk, files

    @abstractmethod
    def place(self, chunk: int) -> str: ...

    @abstractmethod
    def _find(self, chunks: np.ndarray) -> Iterator[Located]:
        """Where chunks are stored. Those that are not are left out and hold the fill value."""

    @abstractmethod
    def _fill_value(self) -> Any: ...

    def _may_lack(self, file: str) -> bool:
        """Whether a file that is not there stands for the fill value."""
        return False

    def close(self) -> None:
        self._files.close()

    def read(self, chunks: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        numbers = np.asarray(chunks, np.int64)
        missing = np.ones(len(numbers), bool)
        packed = []
        for located in self._find(numbers):
            missing[located.first : located.first + len(located.starts)] = False
            for run in _runs(located, self._files.most):
                if run.pipeline.plain and run.stops[0] != FILE_END:
                    self._read_plain(run, numbers, out)
                else:
                    packed.append(run)
        for place in np.flatnonzero(missing).tolist():
            self._target(out, place)[...] = self._fill_value()
        if packed:
            self._read_packed(packed, numbers, out)

    def _target(self, out: np.ndarray, place: int) -> np.ndarray:
        return out[place * self.chunk : (place + 1) * self.chunk]

    def _read_plain(self, run: Located, numbers: np.ndarray, out: np.ndarray) -> None:
        """Read what is not compressed to where it is wanted."""
        whole = self.chunk * self.dtype.itemsize
        last = run.first + len(run.starts) - 1
        for place, stored in enumerate((run.stops - run.starts).tolist(), run.first):
            # The array's last chunk can be stored whole, and only its beginning be wanted.
            needed = self._target(out, place).nbytes
            if stored != whole and not (place == last and stored == needed):
                self._fail(numbers[place], f"it holds {stored} bytes instead of {needed}")
        target = out[run.first * self.chunk : (last + 1) * self.chunk]
        start = int(run.starts[0])
        try:
            count = self._files.fill(run.file, start, [target.view(np.uint8).data])
        except Exception as error:
            self._fail(numbers[run.first], summary(error), error)
        if count < target.nbytes:
            place = run.first + count // whole
            self._fail(numbers[place], f"the file ends at byte {start + count}, inside of it")

    def _read_packed(self, runs: list[Located], numbers: np.ndarray, out: np.ndarray) -> None:
        """Read and decode runs of compressed chunks, as many at once as adjoin in ``out``."""
        for group in _groups(runs, self._files.most):
            ends = [None if run.stops[-1] == FILE_END else int(run.stops[-1]) for run in group]
            content, places, counts = self._files.fetch(
                [
                    Range(run.file, int(run.starts[0]), end)
                    for run, end in zip(group, ends, strict=True)
                ]
            )
            starts, stops = [], []
            for run, place, count in zip(group, places, counts, strict=True):
                if isinstance(count, Exception):
                    self._fail(numbers[run.first], summary(count), count)
                if count is None and not self._may_lack(run.file):
                    self._fail(numbers[run.first], "there is no such file")
                starts.append(run.starts - run.starts[0] + place)
                stops.append(self._ends(run, count or 0, numbers) + place)
            if counts == [None]:
                self._target(out, group[0].first)[...] = self._fill_value()
                continue
            self._decode_all(
                first=group[0],
                content=content,
                starts=np.concatenate(starts),
                stops=np.concatenate(stops),
                numbers=numbers,
                out=out,
            )

    def _ends(self, run: Located, count: int, numbers: np.ndarray) -> np.ndarray:
        """Where chunks end, counted from the first one, if so many bytes hold them."""
        if run.stops[-1] == FILE_END:
            return np.array([count])
        begin = int(run.starts[0])
        stops = run.stops - begin
        if stops[-1] > count:
            beyond = np.flatnonzero(stops > count)
            self._fail(
                numbers[run.first + int(beyond[0])],
                f"the file ends at byte {begin + count}, inside of it",
            )
        return stops

    def _decode_all(
        self,
        first: Located,
        content: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        numbers: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Decode chunks, from the ``first`` one on, that lie in ``content``."""
        target = out[first.first * self.chunk : (first.first + len(starts)) * self.chunk]
        done = len(target) // self.chunk  # whole ones
        pipeline = first.pipeline
        compiled = decompressor() and (summer() or not pipeline.checked)
        if pipeline.only_blosc and compiled and done:
            bits = target[: done * self.chunk].view(f"u{self.dtype.itemsize}")
            damaged = unpack_blosc(
                address=decompressor(),
                summer=summer() if pipeline.checked else 0,
                packed=content,
                starts=starts[:done],
                stops=stops[:done],
                out=bits,
                chunk=self.chunk,
                delta=pipeline.delta,
            )
            if damaged >= 0:
                done = 0  # one by one, they tell what is wrong
        else:
            done = 0
        for which in range(done, len(starts)):
            place = first.first + which
            packed = content[starts[which] : stops[which]].data
            self._decode(int(numbers[place]), pipeline, packed, self._target(out, place))

    def _decode(self, chunk: int, pipeline: Pipeline, packed: memoryview, out: np.ndarray) -> None:
        try:
            if len(out) == self.chunk:
                pipeline.decode(packed, out)
            else:  # the array ends inside the chunk, which is stored whole
                whole = np.empty(self.chunk, self.dtype)
                pipeline.decode(packed, whole)
                out[...] = whole[: len(out)]
        except MemoryError:
            raise
        except Exception as error:
            self._fail(chunk, summary(error), error)

    def _fail(self, chunk: int, reason: str, error: Exception | None = None) -> NoReturn:
        raise ChunkError(int(chunk), self.place(int(chunk)), reason) from error


def _runs(located: Located, most: int) -> Iterator[Located]:
    """Chunks whose bytes adjoin, together up to ``most`` bytes."""
    starts, stops = located.starts, located.stops
    breaks = np.flatnonzero((starts[1:] != stops[:-1]) | (stops[:-1] == FILE_END)) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(starts)], strict=True):
        if stops[last - 1] - starts[first] <= most:  # nearly always
            yield located.part(first, last)
            continue
        while first < last:
            fitting = np.searchsorted(stops[first:last], starts[first] + most, side="right")
            end = first + max(1, int(fitting)) if stops[first] != FILE_END else last
            yield located.part(first, end)
            first = end


def _groups(runs: list[Located], most: int) -> Iterator[list[Located]]:
    """Runs that follow each other, need the same decoding, and have up to ``most`` bytes."""
    group: list[Located] = []
    total = 0
    for run in runs:
        size = most if run.stops[-1] == FILE_END else int(run.stops[-1] - run.starts[0])
        if group and (
            total + size > most
            or run.pipeline is not group[-1].pipeline
            or run.first != group[-1].first + len(group[-1].starts)
        ):
            yield group
            group, total = [], 0
        group.append(run)
        total += size
    if group:
        yield group
