"""Chunks of HDF5 datasets hold what h5py says they hold, whatever their filters and sizes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.io.chunks import LibraryChunks, chunks_of
from cellpatch_fast.io.interfaces import ChunkError
from cellpatch_fast.io.sources.arrays import Hdf5Array

from .chunked import CHUNK, DTYPES, LENGTH, check, descriptors, failure, hammer, target, values_of

FILTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "none": ({}, True),
    "gzip": ({"compression": "gzip"}, True),
    "lzf": ({"compression": "lzf"}, True),
    "gzip and shuffle": ({"compression": "gzip", "shuffle": True}, True),
    "lzf and shuffle": ({"compression": "lzf", "shuffle": True}, True),
    "shuffle": ({"shuffle": True}, True),
    "checksum": ({"compression": "gzip", "fletcher32": True}, False),
}


@contextlib.contextmanager
def stored(values: np.ndarray, **options: Any) -> Iterator[h5py.Dataset]:
    """``values`` as the dataset ``/group/values`` of a new file, open for reading."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.h5"
        userblock = options.pop("userblock_size", None)
        with h5py.File(path, "w", userblock_size=userblock) as file:
            file.create_dataset("group/values", data=values, **options)
        with h5py.File(path) as file:
            yield file["group/values"]


@given(
    length=st.integers(1, 700),
    chunk=st.none() | st.integers(2, 700),
    dtype=st.sampled_from(DTYPES),
    filters=st.sampled_from(sorted(FILTERS)),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_equal_to_h5py(length: int, chunk: int | None, dtype: str, filters: str, seed: int) -> None:
    values = values_of(length, dtype, seed)
    options, decoded_here = FILTERS[filters]
    if chunk is None or chunk > length:
        options, decoded_here, chunks = {}, True, None
    else:
        chunks = (chunk,)
    with stored(values, chunks=chunks, **options) as dataset:
        array = Hdf5Array(dataset)
        direct = array.chunks()
        assert (direct is not None) == decoded_here
        for reader in filter(None, (direct, LibraryChunks(array))):
            check(reader, values, seed)
            reader.close()


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("fill_value", [None, 7])
def test_chunks_that_were_never_written(tmp_path: Path, filters: str, fill_value: Any) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        options = {"chunks": (CHUNK,), "fillvalue": fill_value} | FILTERS[filters][0]
        dataset = file.create_dataset("values", (LENGTH,), "i4", **options)
        dataset[3 * CHUNK + 5 : 6 * CHUNK] = 11
    with h5py.File(tmp_path / "file.h5") as file:
        expected = file["values"][:]
        assert set(expected) == {fill_value or 0, 11}
        reader = chunks_of(Hdf5Array(file["values"]))
        check(reader, expected, 1)
        reader.close()


def test_dataset_that_was_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_dataset("values", (LENGTH,), "i4", fillvalue=5)
    with h5py.File(tmp_path / "file.h5") as file:
        check(chunks_of(Hdf5Array(file["values"])), np.full(LENGTH, 5, np.int32), 1)


@pytest.mark.parametrize("chunks", [None, (CHUNK,)])
def test_dataset_without_elements(chunks: tuple[int, ...] | None) -> None:
    with stored(np.empty(0, np.int32), chunks=chunks, maxshape=(chunks and None,)) as dataset:
        check(chunks_of(Hdf5Array(dataset)), np.empty(0, np.int32), 1)


@pytest.mark.parametrize("skipped", range(4))
def test_filters_that_a_chunk_skips(tmp_path: Path, skipped: int) -> None:
    """Writers leave out a filter where it does not help, chunk by chunk."""
    values = np.arange(2 * CHUNK, dtype=np.int32)
    with h5py.File(tmp_path / "file.h5", "w") as file:
        dataset = file.create_dataset(
            "values", data=values, chunks=(CHUNK,), shuffle=True, compression="gzip"
        )
        with h5py.File(tmp_path / "other.h5", "w") as other:
            options = {"shuffle": not skipped & 1, "compression": None if skipped & 2 else "gzip"}
            part = other.create_dataset("part", data=values[:CHUNK], chunks=(CHUNK,), **options)
            _, packed = part.id.read_direct_chunk((0,))
        dataset.id.write_direct_chunk((0,), packed, filter_mask=skipped)
    with h5py.File(tmp_path / "file.h5") as file:
        np.testing.assert_array_equal(file["values"][:], values)
        array = Hdf5Array(file["values"])
        assert array.chunks() is not None
        check(chunks_of(array), values, 1)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(">i4", {}), ("int32", {"userblock_size": 512})],
    ids=["byte order", "user block"],
)
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_is_left_to_h5py(dtype: str, options: dict[str, Any], compression: str | None) -> None:
    values = np.arange(LENGTH, dtype=dtype)
    with stored(values, chunks=(CHUNK,), compression=compression, **options) as dataset:
        array = Hdf5Array(dataset)
        assert array.chunks() is None
        check(chunks_of(array), values.astype(np.int32), 1)


def test_file_that_is_written_to_is_left_to_h5py(tmp_path: Path) -> None:
    """What was written last may not be in the file yet."""
    with h5py.File(tmp_path / "file.h5", "w") as file:
        dataset = file.create_dataset("values", data=np.arange(LENGTH), chunks=(CHUNK,))
        array = Hdf5Array(dataset)
        dataset[500] = 1_000_003
        assert array.chunks() is None
        check(chunks_of(array), dataset[:], 1)


def test_rows_of_a_matrix(tmp_path: Path) -> None:
    values = values_of(211 * 331, "float32", 7).reshape(211, 331)
    with stored(values, chunks=(13, 17), compression="gzip") as dataset:
        reader = chunks_of(Hdf5Array(dataset))
        assert reader.chunk == 13 * 331
        check(reader, values.reshape(-1), 7)


@pytest.mark.parametrize("filters", FILTERS)
def test_many_threads(filters: str) -> None:
    values = np.arange(LENGTH, dtype=np.uint16)
    with stored(values, chunks=(CHUNK,), **FILTERS[filters][0]) as dataset:
        hammer(chunks_of(Hdf5Array(dataset)), values)


def test_reader_has_its_own_descriptor() -> None:
    """It reads on when the file is closed, and gives its descriptor back."""
    values = np.arange(LENGTH)
    with stored(values, chunks=(CHUNK,)) as dataset:
        before = descriptors()
        reader = chunks_of(Hdf5Array(dataset))
        assert descriptors() == before + 1
        os.unlink(dataset.file.filename)
        dataset.file.close()
        check(reader, values, 1)
        reader.close()
        assert descriptors() == before - 1
        with pytest.raises(ChunkError, match="was closed"):
            reader.read([0], target(reader, [0]))


def test_file_cut_while_open() -> None:
    values = np.arange(LENGTH)
    for options in ({"compression": "gzip"}, {"compression": "lzf"}, {}):
        with stored(values, chunks=(CHUNK,), **options) as dataset:
            reader = chunks_of(Hdf5Array(dataset))
            place = dataset.id.get_chunk_info(7)
            os.truncate(dataset.file.filename, place.byte_offset + place.size - 1)
            error = failure(reader, range(20))
            assert (error.chunk, error.place) == (7, "dataset /group/values, chunk 7")
            assert "ends" in error.reason
            reader.close()


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_damaged_chunk(compression: str, shuffle: bool) -> None:
    values = np.arange(LENGTH)
    with stored(values, chunks=(CHUNK,), compression=compression, shuffle=shuffle) as dataset:
        place = dataset.id.get_chunk_info(7)
        with open(dataset.file.filename, "r+b") as file:
            file.seek(place.byte_offset)
            file.write(b"\xa5" * place.size)
        reader = chunks_of(Hdf5Array(dataset))
        assert failure(reader, range(20)).chunk == 7
        others = [number for number in range(20) if number != 7]
        reader.read(others, target(reader, others))
        reader.close()
