"""What is dropped, and what is unsure, is said: in the summary, in the store, in uns."""

from __future__ import annotations

from pathlib import Path

import anndata
import pytest

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, GeneVocabulary
from cellpatch_fast.atlas import Summary
from cellpatch_fast.io import TokenStore

from ..conftest import GENES, MakeCells

COUNTS = {  # of one input
    "genes_matched": GENES,
    "genes_unknown": 3,
    "genes_duplicated": 2,
    "genes_ambiguous": 1,
}


@pytest.fixture
def model(small_model: CellPatch) -> CellPatch:
    """The genes 0 and 1 have the same symbol."""
    ids, symbols = list(small_model.vocabulary.ensembl_ids), list(small_model.vocabulary.symbols)
    symbols[:2] = ["SAME", "SAME"]
    return CellPatch(small_model.config, GeneVocabulary(ids, symbols)).eval()


@pytest.fixture
def cells(make_cells: MakeCells, model: CellPatch) -> anndata.AnnData:
    """Gene 0 goes by its symbol, which gene 1 has too; gene 7 by the symbol of gene 5."""
    cells = make_cells(53)
    names = list(cells.var_names)
    names[0], names[7] = "SAME", model.vocabulary.symbols[5]
    cells.var_names = names
    return cells


def require_counts(summary: Summary, inputs: int, cells: anndata.AnnData) -> None:
    assert {name: getattr(summary, name) for name in COUNTS} == {
        name: inputs * count for name, count in COUNTS.items()
    }
    assert summary.unknown_entries == inputs * cells.X[:, GENES:].nnz
    # two genes with one token are two entries
    assert summary.entries == inputs * cells.X[:, :GENES].nnz


def test_duplicated_and_ambiguous_genes_are_counted(
    cells: anndata.AnnData, model: CellPatch, tmp_path: Path
) -> None:
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    for path in paths:
        cells.write_h5ad(path)
    embedded, tokens = tmp_path / "embedded.zarr", tmp_path / "tokens.zarr"
    summaries = (
        cp.atlas.embed(paths, model, embedded),
        cp.atlas.tokenize(paths, tokens, model=model),
    )
    for summary in summaries:
        require_counts(summary, inputs=2, cells=cells)
        assert f"{2 * GENES} genes matched, 6 unknown, 4 duplicated, 2 ambiguous, " in str(summary)
    again = cp.atlas.embed(paths, model, embedded), cp.atlas.tokenize(paths, tokens, model=model)
    for summary in again:
        require_counts(summary, inputs=2, cells=cells)
    params = anndata.read_zarr(embedded).uns["X_cellpatch"]["params"]
    for name in (*COUNTS, "entries", "unknown_entries", "empty_cells"):
        assert params[name] == getattr(summaries[0], name), name
    with TokenStore(tokens) as store:
        described = store.describe()
    for name in (*COUNTS, "entries", "unknown_entries", "empty_cells"):
        assert described[name] == getattr(summaries[1], name), name


def test_in_memory_they_are_in_uns(cells: anndata.AnnData, model: CellPatch) -> None:
    cp.tl.embed(cells, model)
    params = cells.uns["X_cellpatch"]["params"]
    assert {name: params[name] for name in COUNTS} == COUNTS
    assert params["unknown_entries"] == cells.X[:, GENES:].nnz
