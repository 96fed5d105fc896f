"""Chunks of HDF5 datasets, read and decoded outside of HDF5.

HDF5 has one lock, which covers decompression: any number of threads read as fast as one. So the
map of the chunks is taken once, and the bytes are read through a second descriptor of the same
file. What h5py would have to convert (foreign byte orders, odd number formats) or undo with
filters other than gzip, shuffle and LZF stays with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import CHUNK, stretches
from .codecs import Codec, Lzf, Pipeline, Shuffle, Zlib
from .direct import DirectChunks, Located
from .files import LocalFile

if TYPE_CHECKING:
    import h5py


class Hdf5Chunks(DirectChunks):
    """The chunks of a dataset; made by `hdf5_chunks`.

    Parameters
    ----------
    dataset
        Of one dimension.
    codecs
        Undo its filters, in the order in which those were applied.
    chunk
        Elements.
    places
        int64 [chunks, 3]: offset and size in the file of each chunk, and its filter mask: bit
        ``f`` is set if filter ``f`` was skipped. Offset -1 if it is not stored.
    """

    def __init__(
        self, dataset: h5py.Dataset, codecs: list[Codec], chunk: int, places: np.ndarray
    ) -> None:
        files = LocalFile(dataset.file.id.get_vfd_handle())
        super().__init__(dataset.shape[0], dataset.dtype, chunk, files)
        self._name, self._codecs, self._places = dataset.name, codecs, places
        self._fill = dataset.fillvalue
        self._pipelines = {0: Pipeline(codecs[::-1])}

    def place(self, chunk: int) -> str:
        return f"dataset {self._name}, chunk {chunk}"

    def _find(self, chunks: np.ndarray) -> Iterator[Located]:
        offsets, sizes, skipped = self._places[chunks].T
        for first, last in stretches(np.where(offsets < 0, -1, skipped)):
            if offsets[first] >= 0:
                part = slice(first, last)
                pipeline = self._pipeline(int(skipped[first]))
                yield Located(first, "", offsets[part], offsets[part] + sizes[part], pipeline)

    def _pipeline(self, skipped: int) -> Pipeline:
        """What undoes the filters, except those of which the bit is set."""
        pipeline = self._pipelines.get(skipped)
        if pipeline is None:
            used = [codec for bit, codec in enumerate(self._codecs) if not skipped >> bit & 1]
            pipeline = self._pipelines.setdefault(skipped, Pipeline(used[::-1]))
        return pipeline

    def _fill_value(self) -> Any:
        return self._fill


def hdf5_chunks(dataset: h5py.Dataset) -> Hdf5Chunks | None:
    """``dataset`` by chunks, or None if h5py has to read it."""
    codecs = _codecs(dataset)
    if codecs is None or not _plain_numbers(dataset) or not _plain_file(dataset.file):
        return None
    if dataset.chunks:
        if not hasattr(dataset.id, "chunk_iter"):  # HDF5 < 1.12.3 finds chunks one by one
            return None
        return Hdf5Chunks(dataset, codecs, dataset.chunks[0], _chunk_map(dataset))
    start = dataset.id.get_offset()
    if start is None or dataset.id.get_create_plist().get_external_count():
        return None  # in the file's metadata, in other files, or nowhere
    size = dataset.dtype.itemsize
    places = np.zeros((-(-dataset.shape[0] // CHUNK), 3), np.int64)
    firsts = np.arange(len(places)) * CHUNK
    places[:, 0] = start + firsts * size
    places[:, 1] = np.minimum(CHUNK, dataset.shape[0] - firsts) * size
    return Hdf5Chunks(dataset, [], CHUNK, places)


def _codecs(dataset: h5py.Dataset) -> list[Codec] | None:
    """What undoes the filters, in the order in which they were applied; None if others did."""
    import h5py

    settings = dataset.id.get_create_plist()
    codecs: list[Codec] = []
    for position in range(settings.get_nfilters()):
        code, _, values, _ = settings.get_filter(position)
        if code == h5py.h5z.FILTER_DEFLATE:
            codecs.append(Zlib())
        elif code == h5py.h5z.FILTER_SHUFFLE:
            codecs.append(Shuffle(values[0]))
        elif code == h5py.h5z.FILTER_LZF:
            codecs.append(Lzf())
        else:
            return None
    return codecs


def _plain_numbers(dataset: h5py.Dataset) -> bool:
    """Whether the bytes in the file are those that NumPy has in memory."""
    import h5py

    if len(dataset.shape) != 1 or dataset.dtype.kind not in "iufb" or not dataset.dtype.isnative:
        return False
    return bool(dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype, logical=True))


def _plain_file(file: h5py.File) -> bool:
    """Whether offsets count from the file's beginning, and what HDF5 knows of is in the file."""
    return bool(
        file.driver == "sec2"
        and file.userblock_size == 0
        and file.mode == "r"
        and not file.swmr_mode
    )


def _chunk_map(dataset: h5py.Dataset) -> np.ndarray:
    places = np.zeros((-(-dataset.shape[0] // dataset.chunks[0]), 3), np.int64)
    places[:, 0] = -1

    def note(info: Any) -> None:
        number = info.chunk_offset[0] // dataset.chunks[0]
        places[number] = info.byte_offset, info.size, info.filter_mask

    dataset.id.chunk_iter(note)
    return places
