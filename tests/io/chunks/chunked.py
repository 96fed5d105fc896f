"""Arrays stored in chunks, in all the ways there are, and what to ask of their readers."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs import numcodecs as v3
from zarr.storage import LocalStore, MemoryStore, ZipStore

from cellpatch_fast.io.chunks.gathering import EntryChunks
from cellpatch_fast.io.interfaces import ChunkError, Chunks
from cellpatch_fast.io.sources.arrays import ZarrArray, absent_chunks, local_keys

DTYPES = ("bool", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float64")
LENGTH, CHUNK, PER_SHARD = 1_009, 53, 3  # 20 chunks, the last one short; 7 shards
PLAIN: dict[str, Any] = {"chunks": (CHUNK,)}
SHARDED: dict[str, Any] = {"chunks": (CHUNK,), "shards": (PER_SHARD * CHUNK,)}

# What chunks are compressed with, for an element size; and whether we decode it ourselves.
V3_CODECS: dict[str, tuple[Callable[[np.dtype[Any]], dict[str, Any]], bool]] = {
    "none": (lambda _: {"compressors": None}, True),
    "default": (lambda _: {}, True),
    "blosc": (lambda _: {"compressors": BloscCodec(cname="lz4", shuffle="shuffle")}, True),
    "bitshuffle": (lambda _: {"compressors": BloscCodec(shuffle="bitshuffle")}, True),
    "zstd": (lambda _: {"compressors": ZstdCodec(level=3, checksum=True)}, True),
    "gzip": (lambda _: {"compressors": GzipCodec()}, True),
    "lz4": (lambda _: {"compressors": v3.LZ4()}, True),
    "checked": (lambda _: {"compressors": [ZstdCodec(), Crc32cCodec()]}, True),
    "checked inside": (lambda _: {"compressors": [Crc32cCodec(), GzipCodec()]}, True),
    "only checked": (lambda _: {"compressors": [Crc32cCodec()]}, True),
    "three": (lambda _: {"compressors": [v3.LZ4(), ZstdCodec(), BloscCodec()]}, True),
    "shuffled": (
        lambda kind: {"compressors": [v3.Shuffle(elementsize=kind.itemsize), v3.Zlib()]},
        True,
    ),
    "delta": (
        lambda kind: {"filters": [v3.Delta(dtype=kind.str)], "compressors": BloscCodec()},
        True,
    ),
    "unknown": (lambda _: {"compressors": v3.BZ2()}, False),
    "checked by numcodecs": (lambda _: {"compressors": v3.CRC32C()}, False),
}
V2_CODECS: dict[str, tuple[Callable[[np.dtype[Any]], dict[str, Any]], bool]] = {
    "none": (lambda _: {"compressors": None}, True),
    "default": (lambda _: {}, True),
    "blosc": (lambda _: {"compressors": numcodecs.Blosc("blosclz", shuffle=2)}, True),
    "gzip": (lambda _: {"compressors": numcodecs.GZip()}, True),
    "lz4": (lambda _: {"compressors": numcodecs.LZ4()}, True),
    "shuffled": (
        lambda kind: {
            "filters": [numcodecs.Shuffle(kind.itemsize)],
            "compressors": numcodecs.Zlib(),
        },
        True,
    ),
    "delta": (
        lambda kind: {
            "filters": [numcodecs.Delta(kind), numcodecs.Shuffle(kind.itemsize)],
            "compressors": numcodecs.Zstd(),
        },
        True,
    ),
    "narrowed": (
        lambda kind: {"filters": [numcodecs.AsType("u8", kind)], "compressors": None},
        False,
    ),
    "unknown": (lambda _: {"compressors": numcodecs.BZ2()}, False),
}


def values_of(length: int, dtype: str, seed: int) -> np.ndarray:
    """Numbers from all over the range, and runs of zeros, which Zarr leaves out."""
    drawn = np.random.default_rng(seed).integers(0, 2**16, length).astype(np.uint64)
    drawn[np.arange(length) // 40 % 3 == 1] = 0
    return (drawn * 40_503 if np.dtype(dtype).kind in "iu" else drawn % 2_048).astype(dtype)


@contextlib.contextmanager
def stored(kind: str, values: np.ndarray, **options: Any) -> Iterator[zarr.Array[Any]]:
    """``values`` as the array ``group/values`` of a new store, open for reading."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        store: Store
        if kind == "memory":
            store = MemoryStore()
        else:
            store = LocalStore(path) if kind == "folder" else ZipStore(path, mode="w")
        zarr.create_array(store, name="group/values", data=values, **options)
        if kind == "zip":
            store.close()
            store = ZipStore(path, mode="r")
        yield zarr.open_array(store, path="group/values", mode="r")
        store.close()


def present(array: zarr.Array[Any]) -> set[str]:
    """The files of the array in its store."""
    store = array.store
    if isinstance(store, LocalStore):
        return local_keys(store.root, array.path)
    if isinstance(store, ZipStore):
        return local_keys(store.path, array.path)
    assert isinstance(store, MemoryStore)
    return {key.removeprefix(f"{array.path}/") for key in store._store_dict}


def with_gaps(array: zarr.Array[Any]) -> ZarrArray:
    """``array`` as one whose missing chunks are zeros."""
    return ZarrArray(array, {key for key, _, _ in absent_chunks(array, present(array))})


def target(reader: Chunks, numbers: Collection[int]) -> np.ndarray:
    """Room for chunks."""
    sizes = [min(reader.chunk, reader.length - number * reader.chunk) for number in numbers]
    return np.empty(sum(sizes), reader.dtype)


def elements(reader: Chunks, values: np.ndarray, numbers: Collection[int]) -> np.ndarray:
    """What ``values`` has where the chunks are."""
    starts = [number * reader.chunk for number in numbers]
    return np.concatenate([values[:0], *(values[at : at + reader.chunk] for at in starts)])


def check(reader: Chunks, expected: np.ndarray, seed: int) -> None:
    """All chunks at once, half of them, and a range are what they should be."""
    assert (reader.length, reader.dtype) == (len(expected), expected.dtype)
    random_state = random.Random(seed)
    every = range(-(-reader.length // reader.chunk))
    for numbers in (every, sorted(random_state.sample(every, len(every) // 2))):
        out = target(reader, numbers)
        reader.read(numbers, out)
        np.testing.assert_array_equal(out, elements(reader, expected, numbers))
    first, last = sorted(random_state.choices(range(len(expected) + 1), k=2))
    entries = EntryChunks("cells", np.array([0, reader.length]), reader)
    with ThreadPoolExecutor(2) as workers:
        part = entries.read(first, last, workers)
    np.testing.assert_array_equal(part, expected[first:last])


def hammer(reader: Chunks, expected: np.ndarray) -> None:
    """Eight threads read random lists of chunks."""
    every = range(-(-reader.length // reader.chunk))

    def some(seed: int) -> None:
        state = random.Random(seed)
        numbers = sorted(state.sample(every, state.randint(1, len(every))))
        out = target(reader, numbers)
        reader.read(numbers, out)
        np.testing.assert_array_equal(out, elements(reader, expected, numbers))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(60)))


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def folder_of(array: zarr.Array[Any]) -> Path:
    assert isinstance(array.store, LocalStore)
    return array.store.root / array.path


def failure(reader: Chunks, numbers: Collection[int]) -> ChunkError:
    with pytest.raises(ChunkError) as caught:
        reader.read(list(numbers), target(reader, numbers))
    return caught.value
