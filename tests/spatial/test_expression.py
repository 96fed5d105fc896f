"""Expression: as scanpy chooses and normalises it, from any file, in memory or on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData
from scipy import sparse

from cellpatch_fast.config import Reading
from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import CellSource
from cellpatch_fast.spatial.expression import SpotExpression, read_expression

from ..conftest import write_zarr
from .conftest import GENES, SPOTS

CHOSEN = 17


def read(data: Any, *, variable_genes: int = CHOSEN, **options: Any) -> SpotExpression:
    return read_expression(data, variable_genes=variable_genes, target_sum=1e4, **options)


def by_scanpy(counts: AnnData, variable_genes: int) -> tuple[np.ndarray, pd.Index]:
    """Dense values, and names of the chosen genes."""
    adata = counts.copy()
    if variable_genes < adata.n_vars:
        scanpy.pp.highly_variable_genes(adata, n_top_genes=variable_genes, flavor="seurat_v3")
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    if variable_genes < adata.n_vars:
        adata = adata[:, adata.var["highly_variable"]]
    return adata.X.toarray(), adata.var_names


@pytest.mark.parametrize("variable_genes", [CHOSEN, GENES, 3000])
def test_expression_is_what_scanpy_makes_of_it(tissue: AnnData, variable_genes: int) -> None:
    expression = read(tissue, variable_genes=variable_genes)
    values, genes = by_scanpy(tissue, variable_genes)
    assert list(expression.genes) == list(genes)
    assert expression.matrix.dtype == np.float32
    np.testing.assert_allclose(expression.matrix.toarray(), values, rtol=2e-6)


def same(one: SpotExpression, other: SpotExpression) -> bool:
    return list(one.genes) == list(other.genes) and all(
        np.array_equal(getattr(one.matrix, name), getattr(other.matrix, name))
        for name in ("indptr", "indices", "data")
    )


FORMATS: dict[str, Callable[[AnnData, Path], Path]] = {
    "csr": lambda adata, folder: written(adata, sparse.csr_matrix, folder),
    "csc": lambda adata, folder: written(adata, sparse.csc_matrix, folder),
    "dense": lambda adata, folder: written(adata, lambda x: x.toarray(), folder),
    "zarr": lambda adata, folder: write_zarr(adata, folder / "tissue.zarr"),
}


def written(adata: AnnData, form: Callable[[Any], Any], folder: Path) -> Path:
    AnnData(form(adata.X), obs=adata.obs, var=adata.var).write_h5ad(folder / "tissue.h5ad")
    return folder / "tissue.h5ad"


def owner(array: Any) -> object:
    """What holds an array's memory."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("on_disk", [False, True])
def test_every_format_gives_the_same_bits(
    tissue: AnnData, form: str, on_disk: bool, tmp_path: Path
) -> None:
    path = FORMATS[form](tissue, tmp_path)
    folder = tmp_path / "scratch" if on_disk else None
    if folder is not None:
        folder.mkdir()
    expression = read(path, folder=folder)
    assert same(expression, read(tissue))
    for array in (expression.matrix.data, expression.matrix.indices):
        assert on_disk == isinstance(owner(array), mmap)


def test_blocks_that_spots_are_read_in_change_nothing(
    tissue: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(tissue)
    path = FORMATS["csr"](tissue, tmp_path)
    defaults = CellSource.read_cells.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "max_entries", 131)
    assert same(read(path), expected)
    assert same(read(path, folder=tmp_path), expected)


def test_layer_and_raw_are_read(tissue: AnnData) -> None:
    logged = tissue.copy()
    scanpy.pp.normalize_total(logged, target_sum=1e4)
    scanpy.pp.log1p(logged)
    logged.layers["counts"] = tissue.X
    logged.raw = tissue
    expected = read(tissue)
    assert same(read(logged, reading=Reading(layer="counts")), expected)
    assert same(read(logged, reading=Reading(use_raw=True)), expected)
    with pytest.raises(InputError, match=r"the 17 most variable of 41 genes are chosen by counts"):
        read(logged)
    everything = read(logged, variable_genes=GENES)  # nothing to choose: taken as they are
    assert np.array_equal(everything.matrix.toarray(), logged.X.toarray())


def test_spots_without_counts_stay_empty(tissue: AnnData) -> None:
    counts = tissue.X.toarray()
    counts[[0, 53]] = 0
    tissue.X = sparse.csr_matrix(counts)
    matrix = read(tissue).matrix
    assert matrix.shape == (SPOTS, CHOSEN)
    assert np.diff(matrix.indptr)[[0, 53]].tolist() == [0, 0]
    assert np.isfinite(matrix.data).all()


def test_entries_that_are_stored_twice_are_added_up(tissue: AnnData) -> None:
    x = tissue.X
    halves = sparse.csr_matrix((SPOTS, GENES), dtype=np.float32)
    ends = np.repeat(x.indptr, 2)[1:-1].reshape(-1, 2)
    order = np.concatenate([np.tile(np.arange(a, b)[::-1], 2) for a, b in ends])
    halves.indices, halves.data = x.indices[order], x.data[order]
    halves.indptr = x.indptr * 2
    assert np.array_equal(halves.toarray(), 2 * x.toarray())
    doubled = AnnData(2 * x, obs=tissue.obs, var=tissue.var)
    assert same(read(AnnData(halves, obs=tissue.obs, var=tissue.var)), read(doubled))


@pytest.mark.parametrize("value", [-3.0, np.nan, np.inf])
@pytest.mark.parametrize("on_disk", [False, True])
def test_impossible_values_anywhere_are_refused(
    value: float, on_disk: bool, tmp_path: Path
) -> None:
    """Also in spots that no sample is drawn from."""
    counts = np.random.default_rng(0).poisson(2.0, (2_503, 7)).astype(np.float32)
    counts[301, 3] = value
    names = pd.DataFrame(index=[f"gene{i}" for i in range(7)])
    with pytest.raises(InputError, match=r"cell 301 \(the first is 0\), gene column 3 \(gene3\)"):
        read(AnnData(counts, var=names), variable_genes=7, folder=tmp_path if on_disk else None)


def test_genes_are_chosen_from_a_sample_of_many_spots(
    tissue: AnnData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cellpatch_fast.spatial.expression.CHOOSING_SPOTS", 67)
    monkeypatch.setattr("cellpatch_fast.spatial.expression.STRETCHES", 3)
    caplog.set_level("INFO", "cellpatch_fast")
    expression = read(tissue)
    assert "variable genes are chosen from 66 of 110 spots" in caplog.text
    spots = np.concatenate([np.arange(start, start + 22) for start in (0, 44, 88)])
    assert list(expression.genes) == list(by_scanpy(tissue[spots], CHOSEN)[1])
    values, _ = by_scanpy(tissue, GENES)
    kept = tissue.var_names.isin(expression.genes)
    np.testing.assert_allclose(expression.matrix.toarray(), values[:, kept], rtol=2e-6)


def test_without_scikit_misc_it_is_named(tissue: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skmisc", None)
    with pytest.raises(InputError, match=r"scikit-misc: pip install 'cellpatch-fast\[spatial\]'"):
        read(tissue)
    assert read(tissue, variable_genes=GENES).matrix.shape == (SPOTS, GENES)


@pytest.mark.parametrize("varying", [0, 1, 3, 12, 23])
def test_genes_that_cannot_be_ranked_are_refused(tissue: AnnData, varying: int) -> None:
    """A curve through few variances, or through those of equal means, cannot be drawn."""
    counts = np.ones((SPOTS, GENES), np.float32)
    counts[::2, :varying] = 4
    with pytest.raises(InputError, match=r"variable genes cannot be told.*variable_genes="):
        read(AnnData(counts, var=tissue.var), variable_genes=2)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_tissue_that_expresses_nothing_is_refused(on_disk: bool, tmp_path: Path) -> None:
    counts = sparse.csr_matrix((SPOTS, 5), dtype=np.float32)
    with pytest.raises(InputError, match="expressed by no spot"):
        read(AnnData(counts), variable_genes=5, folder=tmp_path if on_disk else None)
