"""Arrays on disk: HDF5 datasets and Zarr arrays look the same from here on, as a `StoredArray`.

Zarr reads a chunk that is *absent* as zeros without a word, which is how half-copied stores turn
into wrong results; `absent_chunks` finds those.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ..interfaces import Chunks

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
        self._dataset.read_direct(out, np.s_[start : start + len(out)])

    def chunks(self) -> Chunks | None:
        from ..chunks.hdf5 import hdf5_chunks

        return hdf5_chunks(self._dataset)

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
        `chunks.zarr.zarr_chunks`.
    """

    def __init__(self, array: zarr.Array[Any], may_lack: Collection[str] = ()) -> None:
        self.shape = array.shape
        self.dtype = array.dtype.newbyteorder("=")
        self.chunk = array.chunks[0]
        self._array, self._may_lack = array, may_lack

    def read(self, start: int, out: np.ndarray) -> None:
        from zarr.buffer.cpu import NDBuffer

        rows = slice(start, start + len(out))
        if self._array.dtype == self.dtype:
            self._array.get_basic_selection(rows, out=NDBuffer.from_numpy_array(out))
        else:  # a foreign byte order
            out[...] = self._array[rows]

    def chunks(self) -> Chunks | None:
        from ..chunks.zarr import zarr_chunks

        return zarr_chunks(self._array, self._may_lack)

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
