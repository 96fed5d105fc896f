"""What has no chunks of its own, or has two dimensions, is read by chunks all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cellpatch_fast.io.chunks import chunks_of
from cellpatch_fast.io.sources.arrays import ZarrArray
from cellpatch_fast.io.sources.transpose import TemporaryArray

from .chunked import (
    check,
    hammer,
    stored,
    values_of,
)


@pytest.mark.parametrize("dtype", ["int32", ">i4"])
def test_array_in_memory(dtype: str) -> None:
    values = values_of(70_001, dtype, 5)
    check(chunks_of(values), values.astype(values.dtype.newbyteorder("=")), 5)


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_matrix_follow_each_other(order: Any) -> None:
    values = np.asarray(values_of(211 * 331, "float64", 7).reshape(211, 331), order=order)
    with stored("memory", values, chunks=(13, 331)) as array:
        reader = chunks_of(ZarrArray(array))
        assert reader.chunk == 13 * 331
        check(reader, values.reshape(-1), 7)
    reader = chunks_of(values)
    assert reader.chunk % 331 == 0
    check(reader, values.reshape(-1), 7)


def test_a_chunk_of_a_matrix_has_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellpatch_fast.io.chunks.DENSE_BYTES", 5 * 331 * 8 + 1)
    values = values_of(211 * 331, "float64", 7).reshape(211, 331)
    with stored("memory", values, chunks=(13, 331)) as array:
        reader = chunks_of(ZarrArray(array))
        assert reader.chunk == 5 * 331
        check(reader, values.reshape(-1), 7)


def test_temporary_file_read_by_many_threads() -> None:
    values = values_of(300_007, "int32", 11)
    array = TemporaryArray(len(values), values.dtype)
    array.write(0, values)
    hammer(chunks_of(array), values)
    array.close()
