"""A Zarr chunk that is damaged or not there is refused, by its number and file; never zeros."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from cellpatch_fast.io.chunks import chunks_of
from cellpatch_fast.io.interfaces import ChunkError
from cellpatch_fast.io.sources.arrays import ZarrArray

from .chunked import (
    CHUNK,
    LENGTH,
    PER_SHARD,
    PLAIN,
    SHARDED,
    V3_CODECS,
    failure,
    folder_of,
    stored,
    target,
    with_gaps,
)

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")

CODECS = ("default", "blosc", "gzip", "lz4")
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "cut by one": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "overwritten": lambda content: b"\xa5" * len(content),
}
INDEX = 16 * PER_SHARD + 4  # bytes
SHARD_WAYS = WAYS | {
    "index": lambda content: content[:-INDEX] + b"\xa5" + content[1 - INDEX :],
    "promises too much": lambda content: with_index(content, [2**40, 99] * PER_SHARD),
    "half left out": lambda content: with_index(content, [2**64 - 1, 99] * PER_SHARD),
    "chunks": lambda content: b"\xa5" * (len(content) - INDEX) + content[-INDEX:],
}


def with_index(content: bytes, index: list[int]) -> bytes:
    """A shard with another index, whose checksum is right."""
    listed = np.array(index, "<u8").tobytes()
    return content[:-INDEX] + listed + google_crc32c.value(listed).to_bytes(4, "little")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", WAYS)
def test_damaged_chunk_file(way: str, codec: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**31, LENGTH)
    options = V3_CODECS[codec][0](values.dtype)
    with stored("folder", values, chunks=(CHUNK,), **options) as array:
        file = folder_of(array) / "c/7"
        file.write_bytes(WAYS[way](file.read_bytes()))
        reader = chunks_of(ZarrArray(array))
        error = failure(reader, range(20))
        assert (error.chunk, error.place) == (7, "the chunk file group/values/c/7")
        assert error.reason in str(error)
        others = [number for number in range(20) if number != 7]
        reader.read(others, target(reader, others))
        reader.close()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", SHARD_WAYS)
def test_damaged_shard(way: str, codec: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**31, LENGTH)
    options = V3_CODECS[codec][0](values.dtype)
    with stored("folder", values, **options, **SHARDED) as array:
        file = folder_of(array) / "c/2"
        file.write_bytes(SHARD_WAYS[way](file.read_bytes()))
        reader = chunks_of(ZarrArray(array))
        error = failure(reader, range(20))
        assert error.chunk == 6
        assert error.place == "the chunk file group/values/c/2 (inner chunk 0)"
        others = [number for number in range(20) if number // PER_SHARD != 2]
        reader.read(others, target(reader, others))
        reader.close()


@pytest.mark.parametrize("layout", [SHARDED, PLAIN])
def test_uncompressed_file_is_cut_while_open(layout: dict[str, Any]) -> None:
    values = 1 + np.arange(LENGTH)
    with stored("folder", values, compressors=None, **layout) as array:
        reader = chunks_of(ZarrArray(array))
        reader.read(range(20), target(reader, range(20)))  # the index is known from now on
        file = folder_of(array) / "c/2"
        os.truncate(file, 8 * CHUNK - 1)
        error = failure(reader, range(20))
        assert error.chunk == (6 if "shards" in layout else 2)
        assert "group/values/c/2" in error.place
        reader.close()


@pytest.mark.parametrize("store", ["folder", "memory"])
@pytest.mark.parametrize("layout", [SHARDED, PLAIN])
def test_file_removed_while_open(store: str, layout: dict[str, Any]) -> None:
    """What is not there would be zeros for zarr-python."""
    values = 1 + np.arange(LENGTH)
    with stored(store, values, **layout) as array:
        reader = chunks_of(with_gaps(array))
        key = "group/values/c/2"
        if isinstance(array.store, LocalStore):
            (folder_of(array) / "c/2").unlink()
        else:
            assert isinstance(array.store, MemoryStore)
            del array.store._store_dict[key]
        error = failure(reader, range(20))
        assert error.chunk == (6 if "shards" in layout else 2)
        assert key in error.place
        assert "no such file" in error.reason
        reader.close()


@given(
    codec=st.sampled_from([*CODECS, "bitshuffle"]),
    flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_are_refused_or_decoded_to_something(
    codec: str, flips: list[tuple[int, int]]
) -> None:
    values = np.arange(97, dtype=np.int32) % 11
    store = MemoryStore()
    zarr.create_array(
        store, name="values", data=values, chunks=(97,), **V3_CODECS[codec][0](values.dtype)
    )
    content = bytearray(store._store_dict["values/c/0"].to_bytes())
    for place, value in flips:
        content[place % len(content)] = value
    store._store_dict["values/c/0"] = default_buffer_prototype().buffer.from_bytes(content)
    reader = chunks_of(ZarrArray(zarr.open_array(store, path="values", mode="r")))
    guarded = np.full(97 + 2 * 1_000, 17, np.int32)  # what lies around the target stays
    with contextlib.suppress(ChunkError):
        reader.read([0], guarded[1_000:1_097])
    assert (np.delete(guarded, range(1_000, 1_097)) == 17).all()
