"""What an input holds is told from cells all over it, and every other cell is compared with it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from cellpatch_fast import CellPatch, GeneVocabulary
from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source
from cellpatch_fast.loading import CellLoader
from cellpatch_fast.loading import inputs as module
from cellpatch_fast.preprocessing.detection import InputKindWarning

from ..conftest import MakeCells, write_zarr
from .batches import load

CELLS = 211
LATE = 197  # behind the last run of cells that are looked at: 184 to 195


@pytest.fixture(autouse=True)
def _few_cells_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_CELLS", 96)


def normalised(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    library = np.maximum(counts.sum(1), 1)
    return sparse.csr_matrix(counts.multiply(1e4 / library)).astype(np.float32)


def corrected(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts with fractions, which no whole multiples show."""
    counts = counts.copy()
    counts.data *= np.random.default_rng(1).uniform(2, 3, len(counts.data)).astype(np.float32)
    return counts


FORMS = {
    "raw counts": lambda counts: counts,
    "normalised": normalised,
    "logged": lambda counts: normalised(counts).log1p(),
    "logged to base 2": lambda counts: normalised(counts).log1p() / np.float32(np.log(2)),
    "corrected": corrected,
    "logged without normalising": lambda counts: counts.log1p(),
    "square roots": lambda counts: counts.sqrt(),
}


def changing(make_cells: MakeCells, first: str, second: str, change: int) -> anndata.AnnData:
    adata = make_cells(CELLS)
    adata.X = sparse.vstack([FORMS[first](adata.X)[:change], FORMS[second](adata.X)[change:]])
    adata.X = sparse.csr_matrix(adata.X)
    return adata


def stored(adata: anndata.AnnData, layout: str, folder: Path) -> Any:
    if layout == "dense":
        adata.X = adata.X.toarray()
    elif layout == "by genes":
        adata.X = adata.X.tocsc()
    if layout == "zarr":
        return write_zarr(adata, folder / "cells.zarr")
    if layout != "in memory":
        adata.write_h5ad(folder / "cells.h5ad")
        return folder / "cells.h5ad"
    return adata


LAYOUTS = ["by cells", "by genes", "dense", "zarr", "in memory"]
CHANGES = [
    ("raw counts", "logged"),
    ("raw counts", "square roots"),
    ("raw counts", "logged without normalising"),
    ("normalised", "logged"),
    ("logged", "raw counts"),
    ("logged", "normalised"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_that_are_looked_at_are_all_over(
    make_cells: MakeCells, tmp_path: Path, layout: str
) -> None:
    data = stored(changing(make_cells, "raw counts", "logged", 103), layout, tmp_path)
    with open_source(data) as source:
        sample = module.sample_of(source)
    cells = [sample.position(cell) for cell in range(len(sample))]
    starts = [run * CELLS // 8 for run in range(8)]
    assert cells == [cell for start in starts for cell in range(start, start + 12)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [103, LATE])
def test_raw_counts_that_logarithms_follow_are_refused(
    make_cells: MakeCells, small_model: CellPatch, tmp_path: Path, layout: str, change: int
) -> None:
    data = stored(changing(make_cells, "raw counts", "logged", change), layout, tmp_path)
    with pytest.raises(InputError, match="not all cells hold the same: found ") as error:
        load(data, small_model, batch_size=29)
    message = str(error.value)
    if change == LATE:  # the last cell expresses every gene
        assert "natural logarithms of normalised counts" in message
        assert f"in cells from {LATE} to {CELLS - 1}" in message
        assert "seen in 96 of 211 cells" in message
    else:
        assert "raw counts in cells 1 to " in message
        assert "in cells 105 to 195, of those looked at" in message


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_late_changes_are_found_while_reading(
    make_cells: MakeCells, small_model: CellPatch, first: str, second: str, shuffle: bool
) -> None:
    adata = changing(make_cells, first, second, LATE)
    options = {"shuffle": True, "block_size": 7, "buffer_size": 70} if shuffle else {}
    with pytest.raises(InputError, match="AnnData object: not all cells hold the same") as error:
        load(adata, small_model, batch_size=29, **options)
    assert "in those looked at before. Choose the raw counts" in str(error.value)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("second", ["logged", "corrected"])
def test_logarithms_among_corrected_counts_are_found_where_they_crowd(
    make_cells: MakeCells, small_model: CellPatch, second: str, shuffle: bool
) -> None:
    """Most of these are larger than logarithms, but by far not all."""
    adata = changing(make_cells, "corrected", second, 0)
    corrected = changing(make_cells, "corrected", "corrected", 0)
    # Between the last runs of cells that are looked at: 171 to 182 and 200 to 211.
    adata = anndata.concat([corrected[:183], adata[84:101], corrected[182:]], index_unique="-")
    assert adata.n_obs == 229
    options = {"shuffle": True, "block_size": 41, "buffer_size": 205} if shuffle else {}
    if second == "corrected":
        assert load(adata, small_model, batch_size=29, **options)
        return
    with pytest.raises(InputError, match="natural logarithms of normalised counts") as error:
        load(adata, small_model, batch_size=29, **options)
    first, last = re.findall(r"in cells from (\d+) to (\d+)", str(error.value))[0]
    assert 175 <= int(first) <= 183
    assert 199 <= int(last) < 208


@pytest.mark.parametrize("form", ["raw counts", "normalised", "logged", "corrected"])
def test_cells_that_all_hold_the_same_are_not_suspected(
    make_cells: MakeCells, small_model: CellPatch, form: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(changing(make_cells, form, form, LATE), small_model, batch_size=29)


def test_raw_counts_and_normalised_ones_are_handled_alike(
    make_cells: MakeCells, small_model: CellPatch
) -> None:
    for first, second in (("raw counts", "normalised"), ("normalised", "raw counts")):
        for change in (103, LATE):
            load(changing(make_cells, first, second, change), small_model, batch_size=29)


def test_whoever_says_what_cells_hold_is_obeyed(
    make_cells: MakeCells, small_model: CellPatch
) -> None:
    late = changing(make_cells, "raw counts", "logged", LATE)
    assert load(late, small_model, input="counts")
    early = changing(make_cells, "raw counts", "logged", 103)
    with pytest.warns(InputKindWarning, match="not all cells hold the same.*taken as counts") as w:
        load(early, small_model, input="counts")
    assert len(w) == 1


def test_large_chunks_are_read_in_fewer_places(
    make_cells: MakeCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zarr(make_cells(CELLS), tmp_path / "cells.zarr")
    with open_source(path) as source:
        chunk = sum(array.chunk * array.dtype.itemsize for array in _arrays(source.matrix))
        monkeypatch.setattr(module, "SAMPLE_BYTES", 2 * chunk)
        sample = module.sample_of(source)
        positions = [sample.position(cell) for cell in range(len(sample))]
        assert positions == [*range(48), *range(105, 105 + 48)]
        monkeypatch.setattr(module, "SAMPLE_BYTES", chunk - 1)
        assert module.sample_of(source).position(95) == 95


def _arrays(matrix: Any) -> tuple[Any, Any]:
    return matrix.indices, matrix.data


def test_few_entries_are_read_of_cells_with_many(
    make_cells: MakeCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE_ENTRIES", 8 * 97)
    with open_source(make_cells(CELLS)) as source:
        sample = module.sample_of(source)
    assert 8 <= len(sample) < 96  # one of each run, at least
    assert len(sample.data) < 8 * 310


def test_what_became_of_genes_is_counted(
    make_cells: MakeCells, small_model: CellPatch, small_vocabulary: GeneVocabulary
) -> None:
    adata = make_cells(CELLS)
    adata.var_names = [*adata.var_names[:-2], f"{adata.var_names[5]}.7", adata.var_names[-1]]
    with CellLoader(adata, small_vocabulary, small_model.config) as loader:
        (stream,) = loader.streams
    assert stream.genes_duplicated == 2
    assert stream.genes_ambiguous == 0
    assert stream.genes_unknown == 2
    human = GeneVocabulary.human()
    adata.var_names = [*adata.var_names[:-1], "Y_RNA"]  # of many genes
    with CellLoader(adata, human, small_model.config) as loader:
        (stream,) = loader.streams
    assert stream.genes_ambiguous == 1
