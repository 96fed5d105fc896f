"""Every container, layout, place and dtype gives the same cells, however they are cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellpatch_fast.cells import CellBlock
from cellpatch_fast.io.sources.matrices import MAX_ENTRIES
from cellpatch_fast.io.sources.source import CellSource, open_source

from ..conftest import (
    CELLS,
    CONTAINERS,
    GENES,
    RAW_GENES,
    counts,
    in_layout,
    make_adata,
    replace,
    write_plain,
)

PLACES: dict[str, dict[str, Any]] = {
    "X": {},
    "layer": {"layer": "counts"},
    "raw": {"use_raw": True},
}
EXPECTED = {"X": counts(GENES, 1), "layer": counts(GENES, 2), "raw": counts(RAW_GENES, 3)}
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64"]
TOO_LITTLE_MEMORY = 5_000  # bytes: a CSC matrix is reordered on disk, in many buckets

Store = Callable[..., Path]


def joined(blocks: Iterator[CellBlock], genes: int, start: int = 0) -> sparse.csr_matrix:
    """The blocks as one matrix, after checking that they follow one another from ``start``."""
    indptr, indices, data = [np.zeros(1, np.int64)], [], []
    for block in blocks:
        assert block.start == start
        assert block.indptr.dtype == np.int64
        assert block.indptr[0] == 0
        assert block.indptr[-1] == len(block.indices) == len(block.data)
        assert block.indices.dtype in (np.int32, np.int64)
        start = block.stop
        indptr.append(block.indptr[1:] + indptr[-1][-1])
        indices.append(block.indices)
        data.append(block.data)
    parts = (np.concatenate(data), np.concatenate(indices), np.concatenate(indptr))
    return sparse.csr_matrix(parts, shape=(len(parts[2]) - 1, genes))


def assert_same(matrix: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    """Entry for entry, in the same order, with the same dtype."""
    assert matrix.shape == expected.shape
    assert matrix.dtype == expected.dtype
    np.testing.assert_array_equal(matrix.indptr, expected.indptr)
    np.testing.assert_array_equal(matrix.indices, expected.indices)
    np.testing.assert_array_equal(matrix.data, expected.data)


def all_of(source: CellSource, max_entries: int = MAX_ENTRIES) -> sparse.csr_matrix:
    return joined(source.read_cells(max_entries=max_entries), source.n_genes)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_same_entries_from_every_store(
    stored: Store, container: str, layout: str, place: str
) -> None:
    with open_source(stored(container, layout), **PLACES[place]) as source:
        assert (source.n_cells, source.n_genes) == EXPECTED[place].shape
        assert_same(all_of(source, max_entries=97), EXPECTED[place])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("container", "layout"),
    [("h5ad", "csr"), ("zarr-v3", "csc"), ("h5ad", "csc-on-disk"), ("zarr-v3", "dense")],
)
def test_values_keep_their_dtype(tmp_path: Path, container: str, layout: str, dtype: str) -> None:
    expected = counts(GENES, 1)
    matrix = in_layout(expected, layout.removesuffix("-on-disk"))
    stored_dtype = "float32" if dtype == "float16" else dtype
    adata = anndata.AnnData(matrix.astype(stored_dtype))
    path = write_plain(adata, tmp_path, container)
    if stored_dtype != dtype:  # scipy has no float16, but files do
        key = "X" if layout == "dense" else "X/data"
        replace(path, key, lambda values: values.astype(dtype))
    limit = TOO_LITTLE_MEMORY if layout == "csc-on-disk" else 2**20
    with open_source(path, memory_limit=limit) as source:
        blocks = list(source.read_cells(max_entries=101))
    values = np.concatenate([block.data for block in blocks])
    assert values.dtype == ("uint8" if dtype == "bool" else dtype)
    np.testing.assert_array_equal(values, expected.data.astype(dtype))


@pytest.mark.parametrize("dtype", INTEGERS[2:])
@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("container", ["h5ad", "zarr-v3"])
def test_indices_of_any_dtype(stored: Store, container: str, layout: str, dtype: str) -> None:
    path = stored(container, layout)
    for key in ("X/indices", "X/indptr"):
        replace(path, key, lambda values: values.astype(dtype))
    with open_source(path, memory_limit=TOO_LITTLE_MEMORY) as source:
        assert_same(all_of(source, max_entries=89), EXPECTED["X"])


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("container", ["h5ad", "zarr-v2", "zarr-v3"])
def test_foreign_byte_order(stored: Store, container: str, layout: str) -> None:
    path = stored(container, layout)
    keys = ["X"] if layout == "dense" else ["X/indptr", "X/indices", "X/data"]
    for key in keys:
        replace(path, key, lambda values: values.astype(values.dtype.newbyteorder(">")))
    with open_source(path) as source:
        assert_same(all_of(source, max_entries=89), EXPECTED["X"])


def test_csr_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    shuffled = counts(GENES, 1)
    for cell in range(CELLS):
        entries = slice(*shuffled.indptr[cell : cell + 2])
        shuffled.indices[entries] = shuffled.indices[entries][::-1].copy()
        shuffled.data[entries] = shuffled.data[entries][::-1].copy()
    path = write_plain(anndata.AnnData(shuffled), tmp_path, "h5ad")
    with open_source(path) as source:
        assert_same(all_of(source), shuffled)


def test_stored_zeros_stay_in_sparse_matrices(tmp_path: Path) -> None:
    matrix = counts(GENES, 1)
    matrix.data[::3] = 0
    for layout in (matrix, matrix.tocsc()):
        path = write_plain(anndata.AnnData(layout), tmp_path, "h5ad")
        with open_source(path) as source:
            assert_same(all_of(source), matrix)


CUT_STORES = ("h5ad", "h5ad-gzip", "zarr-v3-sharded")
CUT_LAYOUTS = ("csr", "csc", "dense")


@pytest.fixture(scope="module")
def open_sources(
    templates: Callable[[str, str, str], Path],
) -> Iterator[dict[tuple[str, str], CellSource]]:
    """One open source for every store and layout that is cut below."""
    with contextlib.ExitStack() as stack:
        sources = {}
        for container in CUT_STORES:
            for layout in CUT_LAYOUTS:
                path = templates(container, layout, "float32")
                source = open_source(path, memory_limit=TOO_LITTLE_MEMORY)
                sources[container, layout] = stack.enter_context(source)
        for layout in CUT_LAYOUTS:
            sources["memory", layout] = stack.enter_context(open_source(make_adata(layout)))
        yield sources


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ranges_are_their_cells_exactly(
    open_sources: dict[tuple[str, str], CellSource], data: st.DataObject
) -> None:
    """Also ranges that overlap, or go back: nothing hangs on the order."""
    source = open_sources[data.draw(st.sampled_from(sorted(open_sources)))]
    starts = data.draw(st.lists(st.integers(0, CELLS), max_size=5))
    ranges = [(start, data.draw(st.integers(start, CELLS))) for start in starts]
    max_entries = data.draw(st.integers(1, 3 * GENES))
    blocks = source.read_cells(ranges, max_entries=max_entries)
    for start, stop in ranges:
        while start < stop:
            block = next(blocks)
            assert len(block) >= 1
            assert len(block.data) <= max_entries or len(block) == 1
            assert_same(
                joined(iter([block]), GENES, start), EXPECTED["X"][start : start + len(block)]
            )
            start += len(block)
        assert start == stop
    assert next(blocks, None) is None
    firsts = [
        next(source.read_cells([cells], max_entries=max_entries))
        for cells in ranges
        if cells[0] < cells[1]
    ]
    shortened = source.read_cells(ranges, max_entries=max_entries, whole=False)
    for block, first in zip(shortened, firsts, strict=True):
        assert (block.start, block.stop) == (first.start, first.stop)


def test_blocks_stay_valid_after_the_next_one(stored: Store) -> None:
    with open_source(stored("h5ad-gzip")) as source:
        blocks, copies = [], []
        for block in source.read_cells(max_entries=50):
            blocks.append(block)
            copies.append(block.data.copy())
    for block, copy in zip(blocks, copies, strict=True):
        np.testing.assert_array_equal(block.data, copy)


@pytest.mark.parametrize(
    "limits",
    [
        {"ranges": [(-1, 3)]},
        {"ranges": [(0, 7), (11, CELLS + 1)]},
        {"ranges": [(5, 4)]},
        {"max_entries": 0},
    ],
)
def test_senseless_ranges_are_refused(limits: dict[str, Any]) -> None:
    with open_source(make_adata()) as source, pytest.raises(ValueError, match="cells"):
        source.read_cells(**limits)


def test_closed_source_says_so(stored: Store) -> None:
    with open_source(stored("h5ad")) as source:
        pass
    with pytest.raises(ValueError, match="is closed"):
        source.read_cells()


@pytest.mark.parametrize("container", CONTAINERS)
def test_obs_and_var_as_anndata_reads_them(stored: Store, container: str) -> None:
    adata = make_adata()
    path = stored(container)
    with open_source(path) as source:
        pd.testing.assert_frame_equal(source.var, adata.var)
        pd.testing.assert_frame_equal(source.read_obs(), adata.obs)
        assert source.name == str(path)
    with open_source(path, use_raw=True) as source:
        pd.testing.assert_frame_equal(source.var, adata.raw.var)
        pd.testing.assert_frame_equal(source.read_obs(), adata.obs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_anndata_in_memory(layout: str, place: str) -> None:
    adata = make_adata(layout)
    with open_source(adata, **PLACES[place]) as source:
        assert source.name == "AnnData object"
        assert_same(all_of(source, max_entries=83), EXPECTED[place])
        pd.testing.assert_frame_equal(source.read_obs(), adata.obs)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_anndata_view(layout: str) -> None:
    chosen = np.arange(CELLS)[::-3]
    with open_source(make_adata(layout)[chosen]) as source:
        expected = EXPECTED["X"][chosen]
        expected.sort_indices()
        assert_same(all_of(source, max_entries=83), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_backed_anndata(stored: Store, layout: str, place: str) -> None:
    adata = anndata.read_h5ad(stored("h5ad", layout), backed="r")
    with open_source(adata, **PLACES[place]) as source:
        assert_same(all_of(source, max_entries=83), EXPECTED[place])
    assert adata.isbacked
    assert adata.file.is_open  # it is the caller's
    adata.file.close()


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("container", ["zarr-v2", "zarr-v3"])
def test_anndata_backed_by_zarr(stored: Store, container: str, layout: str) -> None:
    root = zarr.open_group(stored(container, layout), mode="r")
    adata = anndata.AnnData(anndata.io.sparse_dataset(root["X"]))
    with open_source(adata) as source:
        assert_same(all_of(source, max_entries=83), EXPECTED["X"])


@pytest.mark.parametrize("container", CONTAINERS)
def test_fingerprint_changes_with_the_input(stored: Store, container: str) -> None:
    path = stored(container)

    def fingerprint(**place: Any) -> str:
        with open_source(path, **place) as source:
            return source.fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    assert before != fingerprint(layer="counts")
    assert before != fingerprint(use_raw=True)
    stored(container, dtype="float64")
    assert before != fingerprint()


def test_fingerprint_of_an_object_is_its_content() -> None:
    def fingerprint(adata: anndata.AnnData) -> str:
        with open_source(adata) as source:
            return source.fingerprint()

    adata = make_adata()
    assert fingerprint(adata) == fingerprint(make_adata())
    renamed = make_adata()
    renamed.obs_names = [f"other{c}" for c in range(CELLS)]
    assert fingerprint(adata) != fingerprint(renamed)
    adata.X.data[7] += 1
    assert fingerprint(adata) != fingerprint(make_adata())


@pytest.mark.parametrize(
    ("container", "file_format"), [("h5ad", "h5ad"), ("zarr-v2", "Zarr v2"), ("zarr-v3", "Zarr v3")]
)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_describe(stored: Store, container: str, file_format: str, layout: str) -> None:
    path = stored(container, layout)
    with open_source(path, layer="counts") as source:
        assert source.describe() == {
            "name": str(path),
            "format": file_format,
            "matrix": "layers/counts",
            "layout": layout if layout == "dense" else layout.upper(),
            "dtype": "float32",
            "cells": CELLS,
            "genes": GENES,
            "entries": None if layout == "dense" else EXPECTED["layer"].nnz,
            "layers": ["counts"],
            "raw": True,
            "obs_columns": ["kind", "depth"],
            "var_columns": ["symbol"],
        }
