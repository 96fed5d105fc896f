"""Entries are gathered from any chunks to any places; what cannot be read names its owners."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.chunks import chunks_of, gathering, read_whole
from cellpatch_fast.io.chunks.gathering import EntryChunks
from cellpatch_fast.io.sources.arrays import Hdf5Array, ZarrArray

from .chunked import CHUNK, LENGTH, PLAIN, SHARDED, stored
from .test_hdf5 import stored as stored_hdf5


@given(
    cuts=st.lists(st.integers(0, LENGTH), max_size=9),
    drawn=st.lists(st.integers(0, 8), max_size=23),
    ascending=st.booleans(),
)
def test_any_rows_go_to_any_places(cuts: list[int], drawn: list[int], ascending: bool) -> None:
    """Twice over, as two windows that meet in a chunk would."""
    values = 1 + np.arange(LENGTH, dtype=np.int32)
    offsets = np.array([0, *sorted(cuts), LENGTH])
    rows = np.array(sorted({row for row in drawn if row <= len(cuts)}), np.int64)
    if not ascending:
        rows = np.sort(np.concatenate([rows, rows]))
    lengths = offsets[rows + 1] - offsets[rows]
    places = (np.cumsum(lengths[::-1]) - lengths[::-1])[::-1]  # from the last row to the first
    expected = [values[offsets[row] : offsets[row + 1]] for row in rows[::-1]]
    with stored("memory", values, **PLAIN) as array:
        entries = EntryChunks("cells", offsets, chunks_of(ZarrArray(array)))
        for _ in range(2):
            target = np.empty(lengths.sum(), np.int32)
            entries.gather(rows, places, target, entries.share(rows))
            np.testing.assert_array_equal(target, np.concatenate([values[:0], *expected]))
        entries.close()


@pytest.mark.parametrize("layout", [PLAIN, SHARDED])
def test_ranges_in_order_decode_each_chunk_once(
    layout: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "PART", 2 * CHUNK)  # several for each range
    values = 1 + np.arange(LENGTH, dtype=np.int32)
    with stored("folder", values, **layout) as array, ThreadPoolExecutor(3) as workers:
        chunks = chunks_of(ZarrArray(array))
        decoded: list[int] = []
        original = chunks.read

        def read(numbers: object, out: np.ndarray) -> None:
            decoded.extend(np.asarray(numbers).tolist())
            original(numbers, out)  # type: ignore[arg-type]

        monkeypatch.setattr(chunks, "read", read)
        entries = EntryChunks("cells", np.array([0, LENGTH]), chunks)
        for first, last in pairwise([0, 7, 300, 307, 307, 700, LENGTH]):
            np.testing.assert_array_equal(entries.read(first, last, workers), values[first:last])
        entries.close()
    assert sorted(decoded) == list(range(-(-LENGTH // CHUNK)))


@pytest.mark.parametrize("owner", ["cell", "gene"])
def test_a_file_that_is_cut_while_it_is_read_names_the_owners(owner: str) -> None:
    values = np.arange(LENGTH)
    with (
        stored_hdf5(values, chunks=(CHUNK,), compression="gzip") as dataset,
        ThreadPoolExecutor(2) as workers,
    ):
        offsets = np.arange(0, LENGTH + 11, 10)
        entries = EntryChunks("cells.h5ad", offsets, chunks_of(Hdf5Array(dataset)), owner)
        np.testing.assert_array_equal(entries.read(0, 100, workers), values[:100])
        os.truncate(dataset.file.filename, dataset.id.get_chunk_info(7).byte_offset + 1)
        message = rf"cells.h5ad: cannot read {owner}s 37 to 42.*/group/values, chunk 7.*copy"
        with pytest.raises(InputError, match=message):
            entries.read(100, LENGTH, workers)
        entries.close()


@pytest.mark.parametrize("shape", [(LENGTH,), (0,), (31, 37)])
@pytest.mark.parametrize("kind", [">i4", "uint8"])
def test_a_whole_array_is_read(
    shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.io.chunks.TASK_BYTES", 2 * CHUNK)
    values = (1 + np.arange(np.prod(shape))).astype(kind).reshape(shape)
    array = zarr.array(values, chunks=(CHUNK, 13)[: len(shape)])
    for source in (values, ZarrArray(array)):
        whole = read_whole(source)
        assert whole.dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(whole, values)
