"""Counts of selected genes are normalised to the sum of these: said, where anything shows it."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellpatch_fast import GeneVocabulary, pp
from cellpatch_fast.preprocessing.detection import InputKindWarning
from cellpatch_fast.preprocessing.selection import RIBOSOMAL

CELLS, GENES = 61, 1_009
HUMAN = GeneVocabulary.human()
IS_RIBOSOMAL = np.array([RIBOSOMAL.match(symbol) is not None for symbol in HUMAN.symbols])


def make(names: np.ndarray, seed: int = 0) -> anndata.AnnData:
    counts = np.random.default_rng(seed).poisson(0.7, (CELLS, len(names)))
    counts[0] = 0
    return anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame({"batch": pd.Categorical(["a"] * CELLS)}, index=map(str, range(CELLS))),
        var=pd.DataFrame(index=names),
    )


@pytest.fixture
def adata() -> anndata.AnnData:
    """Genes of a whole transcriptome, and too few to be one."""
    ids = np.array(HUMAN.ensembl_ids)
    return make(np.concatenate([ids[IS_RIBOSOMAL], ids[~IS_RIBOSOMAL][:GENES]]))


def normalised(adata: anndata.AnnData, target: float = 1e4) -> sparse.csr_matrix:
    sums = np.maximum(adata.X.sum(1), 1)
    return sparse.csr_matrix(adata.X.multiply(target / sums)).astype(np.float32).log1p()


def assert_silent(adata: anndata.AnnData, **options: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pp.tokenize(adata, **options)  # type: ignore[arg-type]


def test_human_genes_of_ribosomal_proteins() -> None:
    symbols = np.array(HUMAN.symbols)[IS_RIBOSOMAL]
    assert len(symbols) == 77
    assert {"RPL3", "RPS27A", "RPLP0", "RPSA", "RPS4X"} <= set(symbols)
    assert not {"RPS6KA1", "RPL3L", "RPS4Y1", "RPL21P2"} & set(symbols)


def test_whole_transcriptomes_are_no_selection(adata: anndata.AnnData) -> None:
    assert_silent(adata)
    adata.var["highly_variable"] = np.arange(adata.n_vars) % 3 == 0
    adata.obs["total_counts"] = adata.X.sum(1) * 1.2  # genes in few cells were removed
    assert_silent(adata)


@pytest.mark.parametrize("logged", [False, True])
def test_genes_that_are_all_marked_as_variable(adata: anndata.AnnData, logged: bool) -> None:
    adata.var["highly_variable"] = True
    if logged:
        adata.X = normalised(adata)
    said = '"lognorm"' if logged else '"counts"'
    with pytest.warns(InputKindWarning, match=f"1,086 genes are a selection.*{said}"):
        pp.tokenize(adata)
    assert_silent(adata, input=said.strip('"'))


@pytest.mark.parametrize("column", ["total_counts", "nCount_RNA"])
def test_cells_that_had_more_counts(adata: anndata.AnnData, column: str) -> None:
    adata.obs[column] = (adata.X.sum(1) * 1.7).astype(np.float32)
    with pytest.warns(InputKindWarning, match=f'by obs."{column}".*1.7 times the counts'):
        pp.tokenize(adata)
    assert_silent(adata, input="counts")
    adata.obs[column] = adata.obs[column].astype(str)  # numbers no more
    assert_silent(adata)


@pytest.mark.parametrize("logged", [False, True])
def test_genes_that_lack_those_of_every_cell(logged: bool) -> None:
    adata = make(np.array(HUMAN.ensembl_ids)[~IS_RIBOSOMAL][:GENES])
    if logged:
        adata.X = normalised(adata)
    with pytest.warns(InputKindWarning, match="77 genes of ribosomal proteins.* 0 are among"):
        pp.tokenize(adata)


def test_panels_and_genes_selected_after_normalising_are_silent(adata: anndata.AnnData) -> None:
    assert_silent(make(np.array(HUMAN.ensembl_ids)[~IS_RIBOSOMAL][:499]))
    adata.var["highly_variable"] = np.arange(adata.n_vars) % 2 == 0
    adata.X = normalised(adata)
    assert_silent(adata[:, adata.var["highly_variable"]].copy())
