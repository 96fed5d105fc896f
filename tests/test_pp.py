"""The scanpy-shaped functions: scanpy's results, guarded, and one log line of what was decided."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellpatch_fast import pp
from cellpatch_fast.config import CellPatchConfig
from cellpatch_fast.errors import InputError
from cellpatch_fast.genes.vocabulary import GeneMatchWarning, GeneVocabulary

scanpy = pytest.importorskip("scanpy")

CELLS, GENES = 67, 41
SYMBOLS = ["CD3D", "CD8A", "MS4A1", "NKG7", "LYZ", "GNLY", "PPBP", "FCER1A", "CST3", "CD14", "CD4"]
CONTINUOUS = CellPatchConfig(target_sum=997, value_clip=None, value_rounding="none")


@pytest.fixture(scope="module")
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary.human()


@pytest.fixture
def adata() -> anndata.AnnData:
    """Raw counts; eleven human genes and thirty that nobody knows; the fourth cell is empty."""
    counts = np.random.default_rng(0).negative_binomial(0.7, 0.1, (CELLS, GENES))
    counts[3] = 0
    names = SYMBOLS + [f"unheard-of-{i}" for i in range(GENES - len(SYMBOLS))]
    return anndata.AnnData(
        sp.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)]),
        var=pd.DataFrame({"symbol": names}, index=[f"row{i}" for i in range(GENES)]),
    )


def few_matches() -> pytest.WarningsRecorder:
    return pytest.warns(GeneMatchWarning, match="11 of 41 genes")


def test_quality_control_removes_cells_then_genes(
    adata: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cellpatch_fast")
    filtered = pp.quality_control(adata, min_genes=33, min_cells=31, copy=True)
    assert adata.shape == (CELLS, GENES)
    present = adata.X.toarray() > 0
    cells = present.sum(1) >= 33
    genes = present[cells].sum(0) >= 31
    assert 0 < cells.sum() < CELLS
    assert 0 < genes.sum() < GENES
    assert list(filtered.obs_names) == list(adata.obs_names[cells])
    assert list(filtered.var_names) == list(adata.var_names[genes])
    line = f"kept {cells.sum()} of {CELLS} cells and {genes.sum()} of {GENES} genes"
    assert line in caplog.text
    assert pp.quality_control(adata, min_genes=33, min_cells=31) is None
    assert adata.shape == filtered.shape


def test_quality_control_is_off_by_default(adata: anndata.AnnData) -> None:
    pp.quality_control(adata)
    assert adata.shape == (CELLS, GENES)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("key_added", [None, "log1p"])
def test_normalize_is_scanpys(
    adata: anndata.AnnData, layer: str | None, key_added: str | None
) -> None:
    counts = adata.X.copy()
    expected = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(expected, target_sum=997)
    scanpy.pp.log1p(expected)
    if layer is not None:
        adata.layers[layer] = counts.copy()
    result = pp.normalize(adata, target_sum=997, layer=layer, key_added=key_added, copy=True)
    target = key_added or layer
    for place in (None, *result.layers):
        matrix = result.X if place is None else result.layers[place]
        wanted = expected.X if place == target else counts
        np.testing.assert_array_equal(matrix.toarray(), wanted.toarray())
    np.testing.assert_array_equal(adata.X.toarray(), counts.toarray())
    assert "log1p" not in adata.layers
    assert pp.normalize(adata, target_sum=997, layer=layer, key_added=key_added) is None
    assert list(adata.layers) == list(result.layers)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_normalize_refuses_what_is_logged(adata: anndata.AnnData) -> None:
    pp.normalize(adata)
    before = adata.X.copy()
    with pytest.raises(InputError, match=r"X is already logged: .* library size is 10,000"):
        pp.normalize(adata)
    np.testing.assert_array_equal(adata.X.toarray(), before.toarray())
    adata.layers["logged"] = before
    adata.X = np.ones(adata.shape)
    with pytest.raises(InputError, match="layer 'logged' is already logged"):
        pp.normalize(adata, layer="logged")


def test_tokenize_chooses_matrix_and_genes(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cellpatch_fast")
    adata.layers["counts"] = adata.X
    adata.X = -np.ones(adata.shape)
    with few_matches():
        cells = pp.tokenize(adata, layer="counts", gene_column="symbol")
    counts = adata.layers["counts"].toarray().astype(np.float64)
    scale = 1e4 / np.maximum(counts.sum(1, keepdims=True), 1)
    expected = np.minimum(np.rint(np.log1p(counts * scale)), 5)[:, : len(SYMBOLS)]
    tokens = vocabulary.match(SYMBOLS).tokens
    rows, columns = np.nonzero(counts[:, : len(SYMBOLS)])
    columns = columns[np.lexsort([tokens[columns], rows])]  # in each cell by token
    assert cells.offsets.tolist() == np.searchsorted(rows, np.arange(CELLS + 1)).tolist()
    np.testing.assert_array_equal(cells.genes.numpy(), tokens[columns].astype(np.uint16))
    np.testing.assert_array_equal(cells.values.numpy(), expected[rows, columns])
    (record,) = caplog.records
    empty = int((counts[:, : len(SYMBOLS)].sum(1) == 0).sum())
    unknown = np.count_nonzero(counts[:, len(SYMBOLS) :])
    for part in (
        *("AnnData object", "raw counts", "11 of 41 genes matched by", "symbol", "30 unknown"),
        *(f"{CELLS} cells ({empty} empty)", f"{len(rows)} entries ({unknown:,} of unknown genes"),
    ):
        assert part in record.getMessage()


def test_tokenize_a_file_is_tokenize_its_cells(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with few_matches():
        from_file = pp.tokenize(tmp_path / "cells.h5ad", vocabulary)
    with few_matches():
        from_memory = pp.tokenize(adata, vocabulary)
    for name in ("offsets", "genes", "values"):
        assert torch.equal(
            getattr(from_file, name).to(torch.int64), getattr(from_memory, name).to(torch.int64)
        )


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("config", [CONTINUOUS, None], ids=["continuous", "discrete"])
def test_tokenize_gives_the_same_bits_from_every_format_and_order_of_genes(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    config: CellPatchConfig | None,
    tmp_path: Path,
) -> None:
    """CSR, CSC and dense files, integers and floats, genes in any order, CD4 listed twice."""
    counts = adata.X.toarray()
    adata.var.index = [*adata.var["symbol"][:-1], "CD4"]
    assert (np.count_nonzero(counts[:, [10, -1]], axis=1) == 2).any()
    seen: list[list[bytes]] = []
    for columns in (np.arange(GENES), np.random.default_rng(1).permutation(GENES)):
        for form, dtype in ((sp.csr_matrix, "f4"), (sp.csc_matrix, "i8"), (np.asarray, "i4")):
            path = tmp_path / f"{len(seen)}.h5ad"
            matrix = form(counts[:, columns].astype(dtype))
            anndata.AnnData(matrix, var=adata.var.iloc[columns]).write_h5ad(path)
            with pytest.warns(GeneMatchWarning, match="12 of 41 genes"):
                cells = pp.tokenize(path, vocabulary, config)
            arrays = (cells.offsets, cells.genes, cells.values)
            seen.append([array.numpy().tobytes() for array in arrays])
    assert len(seen) == 6
    assert seen[1:] == seen[:-1]


def test_tokenize_for_a_continuous_model(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    with few_matches():
        values = pp.tokenize(adata, vocabulary, CONTINUOUS).values
    counts = adata.X.toarray().astype(np.float64)
    known = counts[:, np.argsort(vocabulary.match(SYMBOLS).tokens)]
    library = counts.sum(1)[known.nonzero()[0]]
    expected = np.log1p(known[known.nonzero()] * 997 / library)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


def test_tokenize_scanpys_bundled_data(
    vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged values of a gene subset in raw: clipped and rounded, not logged again."""
    caplog.set_level(logging.INFO, "cellpatch_fast")
    pbmc = scanpy.datasets.pbmc68k_reduced()
    cells = pp.tokenize(pbmc, vocabulary, use_raw=True)
    match = vocabulary.match(list(pbmc.raw.var_names))
    assert match.matched > 700
    raw = pbmc.raw.X.tocsr()
    values, tokens = np.minimum(np.rint(raw.data), 5), match.tokens[raw.indices]
    order = np.lexsort([values, tokens, raw.nonzero()[0]])
    order = order[tokens[order] >= 0]
    np.testing.assert_array_equal(cells.genes.numpy(), tokens[order])
    np.testing.assert_array_equal(cells.values.numpy(), values[order])
    assert "natural logarithms" in caplog.text
    with pytest.raises(InputError, match=r"raw counts were expected, but found natural log"):
        pp.tokenize(pbmc, vocabulary, use_raw=True, input="counts")
    with pytest.raises(InputError, match="negative; scaled data are"):
        pp.tokenize(pbmc, vocabulary)


def test_bad_value_behind_the_sample_is_found(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    cells = anndata.concat([adata] * 29, index_unique="-", merge="same")
    entry = cells.X.indptr[1789] + 7
    cells.X.data[entry] = np.nan
    gene = cells.var_names[cells.X.indices[entry]]
    cells.write_h5ad(tmp_path / "bad.h5ad")
    with (
        few_matches(),
        pytest.raises(InputError, match=rf"bad\.h5ad: cell 1789 .*\({gene}\).* nan"),
    ):
        pp.tokenize(tmp_path / "bad.h5ad", vocabulary)
