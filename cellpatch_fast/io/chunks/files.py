"""Byte ranges of local files, read by many threads at a time.

Files are read with ``pread``, never mapped: a mapped file that someone cuts short kills the
process, where a read says so. A few descriptors stay open, those used last; one that another
thread still reads from is closed by that thread when it is done.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

MOST_OPEN = 32  # files of a folder, per array
KEPT_BYTES = 4 * 2**20  # a thread keeps its buffer for the next time if it is not larger
VECTORS = 512  # buffers filled by one call; the system takes 1,024


class Range(NamedTuple):
    """Bytes of a file: to its end if ``stop`` is None, its last ones if ``start`` is negative."""

    file: str
    start: int
    stop: int | None


class Fetched(NamedTuple):
    """Bytes of several ranges.

    ``content`` (uint8) has the bytes of range ``r`` from ``starts[r]`` on. ``counts[r]`` says how
    many there are, less than asked for if the file ends; None if there is no such file, or what
    went wrong in reading it.
    """

    content: np.ndarray
    starts: list[int]
    counts: list[int | Exception | None]


class Ranges(Protocol):
    """Something that holds files."""

    most: int
    """Ranges that adjoin are worth reading together up to so many bytes."""

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        """The ranges' bytes, valid until this thread fetches others."""

    def fill(self, file: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Read consecutive bytes into ``buffers``; returns how many there were."""

    def close(self) -> None:
        """Give back what is open. Reading is over then."""


class Descriptor:
    """An open file, closed when the last one lets go of it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        """Read consecutive bytes into ``buffers``; returns their number, less if the file ends."""
        done = 0
        for first in range(0, len(buffers), VECTORS):
            rest = list(buffers[first : first + VECTORS])
            while rest:
                count = os.preadv(self.number, rest, start + done)
                if not count and any(len(buffer) for buffer in rest):
                    return done
                done += count
                while rest and count >= len(rest[0]):
                    count -= len(rest.pop(0))
                if rest:
                    rest[0] = rest[0][count:]
        return done


class LocalFiles:
    """The files of a folder, opened as they are needed."""

    most = 2**20  # what a read call costs is nothing beside that, and it stays in the cache

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._open: OrderedDict[str, Descriptor] = OrderedDict()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.local()

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        starts, total = [], 0
        opened: list[tuple[Descriptor, int, int] | Exception | None] = []
        for file, start, stop in ranges:
            starts.append(total)
            try:
                descriptor = self._descriptor(file)
                if start < 0 or stop is None:
                    size = os.fstat(descriptor.number).st_size
                    start, stop = max(0, size + start) if start < 0 else start, size
                opened.append((descriptor, start, max(0, stop - start)))
                total += max(0, stop - start)
            except FileNotFoundError:
                opened.append(None)
            except OSError as error:
                opened.append(error)
        buffer = self._buffer(total)
        counts: list[int | Exception | None] = []
        for place, wanted in zip(starts, opened, strict=True):
            if not isinstance(wanted, tuple):
                counts.append(wanted)
                continue
            descriptor, start, size = wanted
            try:
                counts.append(descriptor.fill(start, [buffer[place : place + size]]))
            except OSError as error:
                counts.append(error)
        return Fetched(np.frombuffer(buffer, np.uint8), starts, counts)

    def fill(self, file: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._descriptor(file).fill(start, buffers)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._open.clear()

    def _descriptor(self, file: str) -> Descriptor:
        with self._lock:
            if self._closed:
                raise OSError("the array was closed")
            descriptor = self._open.get(file)
            if descriptor is not None:
                self._open.move_to_end(file)
                return descriptor
        opened = Descriptor(os.open(f"{self._folder}/{file}", os.O_RDONLY | os.O_CLOEXEC))
        with self._lock:
            if not self._closed:
                self._open[file] = opened
                if len(self._open) > MOST_OPEN:
                    self._open.popitem(last=False)
        return opened

    def _buffer(self, size: int) -> memoryview:
        """Memory of this thread's, so that it need not be mapped and cleared anew each time."""
        kept: np.ndarray | None = getattr(self._thread, "buffer", None)
        if kept is None or len(kept) < size:
            kept = np.empty(size, np.uint8)
            if size <= KEPT_BYTES:
                self._thread.buffer = kept
        return kept.data[:size]


class LocalFile(LocalFiles):
    """One file that is open already, of which this keeps its own descriptor."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(Path())
        self._open[""] = Descriptor(os.dup(descriptor))
