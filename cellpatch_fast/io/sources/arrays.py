"""Arrays on disk, read in file order: each compressed chunk is decoded once.

HDF5 datasets, Zarr arrays and temporary files look the same from here: a `StoredArray` copies a
range of its first axis into memory that the caller owns. On top of it, a `SequentialReader` asks
for whole chunks only and carries the decoded tail of one range over to the next, so the ranges
that callers want need not know about chunks.

Whatever goes wrong below (a cut file, a damaged chunk) becomes one `InputError` that names the
file, the chunk and the cells in it. Zarr reads a chunk that is *absent* as zeros without a word,
which is how half-copied stores turn into wrong results; `absent_chunks` finds those.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError, summary
from ..chunks import read_range
from ..interfaces import ChunkError, Chunks, StoredArray, remedy

if TYPE_CHECKING:
    import h5py
    import zarr


class Hdf5Array:
    """A dataset of an HDF5 file.

    Raises
    ------
    InputError
        If it is compressed with a filter that is not installed.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.shape = dataset.shape
        self.dtype = dataset.dtype.newbyteorder("=")
        self.chunk = dataset.chunks[0] if dataset.chunks else 1
        self._dataset = dataset
        _require_filters(dataset)

    def read(self, start: int, out: np.ndarray) -> None:
        if self.chunk > 1 and len(out) and self._chunks is not None:
            read_range(self._chunks, start, out)
        else:
            self._dataset.read_direct(out, np.s_[start : start + len(out)])

    def chunks(self) -> Chunks | None:
        from ..chunks.hdf5 import hdf5_chunks

        return hdf5_chunks(self._dataset)

    @functools.cached_property
    def _chunks(self) -> Chunks | None:
        return self.chunks()

    def close(self) -> None:
        """Give back what reading has opened; the file stays its owner's."""
        opened = self.__dict__.get("_chunks")  # if it was needed
        if opened is not None:
            opened.close()

    def place(self, start: int) -> str:
        where = f"dataset {self._dataset.name}"
        return f"{where}, chunk {start // self.chunk}" if self.chunk > 1 else where


def _require_filters(dataset: h5py.Dataset) -> None:
    """Raise `InputError` unless HDF5 has the filters of ``dataset``, or hdf5plugin does."""
    import h5py

    settings = dataset.id.get_create_plist()
    for position in range(settings.get_nfilters()):
        code, _, _, description = settings.get_filter(position)
        if not h5py.h5z.filter_avail(code):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(code):
            filter_name = description.decode(errors="replace") or "unnamed"
            raise InputError(
                f"{dataset.file.filename}: {dataset.name} is compressed with the HDF5 filter "
                f"{code} ({filter_name}), which is not installed. Install the package hdf5plugin."
            )


class ZarrArray:
    """An array of a Zarr store, version 2 or 3, sharded or not.

    Parameters
    ----------
    may_lack
        Keys of the chunk files that stand for the fill value if they are not there; see
        `chunks_zarr.zarr_chunks`.
    """

    def __init__(self, array: zarr.Array[Any], may_lack: Collection[str] = ()) -> None:
        self.shape = array.shape
        self.dtype = array.dtype.newbyteorder("=")
        self.chunk = array.chunks[0]
        self._array, self._may_lack = array, may_lack

    def read(self, start: int, out: np.ndarray) -> None:
        if len(out) and self._chunks is not None:
            read_range(self._chunks, start, out)
            return
        from zarr.buffer.cpu import NDBuffer

        rows = slice(start, start + len(out))
        if self._array.dtype == self.dtype:
            self._array.get_basic_selection(rows, out=NDBuffer.from_numpy_array(out))
        else:  # a foreign byte order
            out[...] = self._array[rows]

    def chunks(self) -> Chunks | None:
        from ..chunks.zarr import zarr_chunks

        return zarr_chunks(self._array, self._may_lack)

    @functools.cached_property
    def _chunks(self) -> Chunks | None:
        return self.chunks()

    def close(self) -> None:
        """Give back what reading has opened; the store stays its owner's."""
        opened = self.__dict__.get("_chunks")  # if it was needed
        if opened is not None:
            opened.close()

    def place(self, start: int) -> str:
        from ..chunks.zarr import place_of

        return place_of(self._array, start)


def absent_chunks(array: zarr.Array[Any], present: Collection[str]) -> list[tuple[str, int, int]]:
    """Key, first row and end of every chunk (or shard) of ``array`` that is not ``present``."""
    absent = []
    for position in chunk_positions(array):
        key = array.metadata.encode_chunk_key(position)
        if key not in present:
            stored = (array.shards or array.chunks)[0]
            start = position[0] * stored
            absent.append((key, start, min(start + stored, array.shape[0])))
    return absent


def chunk_positions(array: zarr.Array[Any]) -> Iterator[tuple[int, ...]]:
    """Where the chunk files of ``array`` are in their grid."""
    stored = array.shards or array.chunks
    counts = [-(-size // chunk) for size, chunk in zip(array.shape, stored, strict=True)]
    return itertools.product(*map(range, counts))


def local_keys(path: Path, inside: str) -> set[str]:
    """What a Zarr folder or zip file holds below the array ``inside``, relative to it."""
    if path.is_dir():
        top = path / inside
        return {
            (Path(folder) / file).relative_to(top).as_posix()
            for folder, _, files in os.walk(top)
            for file in files
        }
    import zipfile

    with zipfile.ZipFile(path) as archive:
        prefix = f"{inside}/"
        return {key.removeprefix(prefix) for key in archive.namelist() if key.startswith(prefix)}


class SequentialReader:
    """Reads ascending ranges of an array and decodes each chunk once.

    Parameters
    ----------
    array
        What to read; an array in memory is sliced without a copy.
    name
        File (and element) for messages.
    owners
        int64 [owners + 1]: owner ``o`` has the rows ``owners[o] : owners[o + 1]``. None: each
        row is its own owner. Only messages need it.
    noun
        What an owner is: ``"cells"`` or ``"genes"``.
    most
        At most so many rows are held, even if a chunk has more (and is then decoded again).
    """

    def __init__(
        self,
        array: StoredArray | np.ndarray,
        name: str,
        owners: np.ndarray | None = None,
        noun: str = "cells",
        most: int | None = None,
    ) -> None:
        self._array, self._name, self._owners, self._noun = array, name, owners, noun
        if not isinstance(array, np.ndarray):
            self._chunk = min(array.chunk, most or array.chunk)
            self._buffer = np.empty((0, *array.shape[1:]), array.dtype)
            self._first = 0  # the row that the buffer starts with

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows ``first : last``: a view, valid for as long as the caller keeps it."""
        if isinstance(self._array, np.ndarray):
            return self._array[first:last]
        decoded = self._first + len(self._buffer)
        if last > decoded or first < self._first:
            carried = self._buffer[:0]
            begin = position = first // self._chunk * self._chunk
            if self._first <= first < decoded:
                carried = self._buffer[first - self._first :]
                begin, position = first, decoded
            end = min(-(-last // self._chunk) * self._chunk, self._array.shape[0])
            # A new buffer each time: the views handed out before stay what they were.
            buffer = np.empty((end - begin, *self._array.shape[1:]), self._array.dtype)
            buffer[: len(carried)] = carried
            self._decode(self._array, position, buffer[len(carried) :])
            self._buffer, self._first = buffer, begin
        return self._buffer[first - self._first : last - self._first]

    def _decode(self, array: StoredArray, start: int, out: np.ndarray) -> None:
        if not len(out):
            return
        stop = start + len(out)
        try:
            array.read(start, out)
        except MemoryError:
            raise
        except ChunkError as error:
            first = error.chunk * array.chunk
            first, last = max(start, first), min(first + array.chunk, stop)
            raise self._refusal(first, last, error.place, error.reason) from error
        except Exception as error:
            first, last = self._damage(array, start, stop)
            raise self._refusal(first, last, array.place(first), summary(error)) from error

    def _refusal(self, first: int, last: int, place: str, reason: str) -> InputError:
        return InputError(
            f"{self._name}: cannot read {self._noun} {self._owned(first, last)}, stored in "
            f"{place} ({reason}). {remedy(self._name)}."
        )

    def _damage(self, array: StoredArray, start: int, stop: int) -> tuple[int, int]:
        """The rows of the first chunk in ``start : stop`` that cannot be read."""
        if array.chunk == 1:
            return start, stop
        for first in range(start, stop, self._chunk):
            last = min(first + self._chunk, stop)
            try:
                array.read(first, np.empty((last - first, *array.shape[1:]), array.dtype))
            except Exception:  # the error itself is being reported by the caller
                return first, last
        return start, stop

    def _owned(self, first: int, last: int) -> str:
        """The owners of the rows ``first : last``, in words."""
        if self._owners is not None:
            first = int(np.searchsorted(self._owners, first, side="right")) - 1
            last = int(np.searchsorted(self._owners, last, side="left"))
        return f"{first} to {last - 1}" if last - first > 1 else str(first)
