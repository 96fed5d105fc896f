"""Zarr chunks hold what zarr-python says they hold: any sizes, codecs, store and threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec

from cellpatch_fast.io.chunks import LibraryChunks, chunks_of, files
from cellpatch_fast.io.interfaces import ChunkError
from cellpatch_fast.io.sources.arrays import ZarrArray

from .chunked import (
    CHUNK,
    DTYPES,
    LENGTH,
    PLAIN,
    SHARDED,
    V2_CODECS,
    V3_CODECS,
    check,
    descriptors,
    hammer,
    stored,
    target,
    values_of,
    with_gaps,
)

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


@given(
    store=st.sampled_from(["folder", "folder", "zip", "memory"]),
    length=st.integers(1, 400),
    chunk=st.integers(1, 10) | st.integers(11, 500),
    per_shard=st.none() | st.integers(1, 5),
    index_location=st.sampled_from(["start", "end"]),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(sorted(V3_CODECS)),
    fill_value=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_zarr_version_3(
    store: str,
    length: int,
    chunk: int,
    per_shard: int | None,
    index_location: str,
    dtype: str,
    codec: str,
    fill_value: int,
    seed: int,
) -> None:
    values = values_of(length, dtype, seed)
    if codec == "delta" and values.dtype.kind not in "iu":
        codec = "default"
    make_codecs, decoded_here = V3_CODECS[codec]
    shards: dict[str, Any] = {}
    if per_shard is not None:
        shards = {"shards": {"shape": (chunk * per_shard,), "index_location": index_location}}
    options = {"chunks": (chunk,), "fill_value": fill_value} | shards | make_codecs(values.dtype)
    with stored(store, values, **options) as array:
        np.testing.assert_array_equal(array[:], values)
        source = with_gaps(array)
        direct = source.chunks()
        assert (direct is not None) == decoded_here
        for reader in filter(None, (direct, LibraryChunks(source))):
            check(reader, values, seed)
            reader.close()


@given(
    store=st.sampled_from(["folder", "zip", "memory"]),
    length=st.integers(1, 400),
    chunk=st.integers(1, 10) | st.integers(11, 500),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(sorted(V2_CODECS)),
    fill_value=st.sampled_from([0, 1, None]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_zarr_version_2(
    store: str,
    length: int,
    chunk: int,
    dtype: str,
    codec: str,
    fill_value: int | None,
    seed: int,
) -> None:
    values = values_of(length, dtype, seed)
    if codec in ("delta", "narrowed") and values.dtype.kind not in "iu":
        codec = "default"
    make_codecs, decoded_here = V2_CODECS[codec]
    options = {"chunks": (chunk,), "fill_value": fill_value, "zarr_format": 2}
    with stored(store, values, **options, **make_codecs(values.dtype)) as array:
        np.testing.assert_array_equal(array[:], values)
        source = with_gaps(array)
        direct = source.chunks()
        assert (direct is not None) == decoded_here
        check(chunks_of(source), values, seed)


@pytest.mark.parametrize(
    "options",
    [{"zarr_format": 2}, {"zarr_format": 3}, {"serializer": BytesCodec(endian="big")}],
    ids=["v2", "v3", "v3-codec"],
)
@pytest.mark.parametrize("dtype", [">i4", ">f8", "<i4"])
def test_foreign_byte_order(dtype: str, options: dict[str, Any]) -> None:
    values = values_of(LENGTH, dtype, 3)
    with stored("memory", values, chunks=(CHUNK,), **options) as array:
        check(chunks_of(with_gaps(array)), values.astype(values.dtype.newbyteorder("=")), 3)


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 2)


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize("store", ["folder", "zip", "memory"])
@pytest.mark.parametrize("compressors", ["auto", None])
@pytest.mark.parametrize("layout", [SHARDED, PLAIN])
def test_many_threads(store: str, compressors: Any, layout: dict[str, Any]) -> None:
    values = 1 + np.arange(LENGTH, dtype=np.uint32)
    with stored(store, values, compressors=compressors, **layout) as array:
        reader = chunks_of(ZarrArray(array))
        hammer(reader, values)
        reader.close()


@pytest.mark.parametrize("layout", [SHARDED, PLAIN])
def test_files_stay_open_but_few_and_none_after_close(layout: dict[str, Any]) -> None:
    values = 1 + np.arange(LENGTH, dtype=np.uint32)
    with stored("folder", values, **layout) as array:
        before = descriptors()
        reader = chunks_of(ZarrArray(array))
        hammer(reader, values)
        assert before < descriptors() <= before + files.MOST_OPEN
        reader.close()
        assert descriptors() == before
        with pytest.raises(ChunkError, match="was closed"):
            reader.read([0], target(reader, [0]))
        assert descriptors() == before


def test_index_of_a_shard_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 1 + np.arange(LENGTH, dtype=np.uint32)
    with stored("folder", values, **SHARDED) as array:
        reader: Any = chunks_of(ZarrArray(array))
        read, original = [], reader._read_index

        def count(key: str) -> np.ndarray:
            read.append(key)
            return original(key)

        monkeypatch.setattr(reader, "_read_index", count)
        hammer(reader, values)
        assert sorted(read) == sorted(f"group/values/c/{shard}" for shard in range(7))


@pytest.mark.parametrize("layout", [SHARDED, PLAIN])
def test_array_without_elements(layout: dict[str, Any]) -> None:
    with stored("folder", np.empty(0, np.int32), **layout) as array:
        check(chunks_of(ZarrArray(array)), np.empty(0, np.int32), 1)
