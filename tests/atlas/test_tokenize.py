"""`atlas.tokenize`: files in, one token store with scanpy's values out, in any order."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, InputError, RaggedCells
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.stores.buckets import Buckets

from ..conftest import GENES, MakeCells, Tokenize, tokenizing, tree, write_zarr

pytestmark = pytest.mark.usefixtures("_small_pieces")

CELLS = 211
CONTINUOUS = CellPatchConfig(value_rounding="none", value_clip=None)


def by_scanpy(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, discrete: bool = True
) -> pd.DataFrame:
    """Values by cell and token, of the expressed genes that the vocabulary has."""
    adata = anndata.AnnData(adata.X.astype(np.float64), var=adata.var)
    expressed = (adata.X != 0).toarray()
    with warnings.catch_warnings(action="ignore"):  # there is an empty cell
        sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    values = adata.X.toarray()
    values = np.rint(values.clip(max=5)) if discrete else values.astype(np.float32)
    tokens = vocabulary.match(adata.var_names).tokens
    cells, genes = np.nonzero(expressed & (tokens >= 0))
    table = pd.DataFrame({"cell": cells, "token": tokens[genes], "value": values[cells, genes]})
    return table.sort_values(["cell", "token"], ignore_index=True)


def as_table(cells: RaggedCells) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "cell": np.repeat(np.arange(len(cells)), cells.lengths.numpy()),
            "token": cells.genes.numpy().astype(np.int32),
            "value": cells.values.numpy().astype(np.float64),
        }
    )


def assert_same(cells: RaggedCells, other: RaggedCells) -> None:
    for found, expected in (
        (cells.offsets, other.offsets),
        (cells.genes, other.genes),
        (cells.values, other.values),
    ):
        assert found.dtype == expected.dtype
        assert np.array_equal(found.numpy(), expected.numpy())


def test_store_holds_what_scanpy_makes(
    tokenize: Tokenize, cells_file: Path, small_vocabulary: GeneVocabulary
) -> None:
    adata = anndata.read_h5ad(cells_file)
    cells = tokenize(cells_file)
    assert cells.values.dtype == torch.uint8
    pd.testing.assert_frame_equal(as_table(cells), by_scanpy(adata, small_vocabulary))
    assert cells.lengths[0] == 0
    assert cells.lengths[-1] == GENES


def test_continuous_values_are_scanpys_in_half_precision(
    tokenize: Tokenize, cells_file: Path, small_vocabulary: GeneVocabulary
) -> None:
    cells = tokenize(cells_file, config=CONTINUOUS)
    assert cells.values.dtype == torch.float16
    expected = by_scanpy(anndata.read_h5ad(cells_file), small_vocabulary, discrete=False)
    found = as_table(cells)
    pd.testing.assert_frame_equal(found.drop(columns="value"), expected.drop(columns="value"))
    np.testing.assert_allclose(found["value"], expected["value"], rtol=2**-11, atol=0)


@pytest.mark.parametrize(
    ("container", "layout"),
    [("zarr-v3", "csr"), ("h5ad", "csc"), ("zarr-v3", "dense"), ("layer", "csr"), ("raw", "csc")],
)
def test_same_tokens_from_every_kind_of_file(
    tokenize: Tokenize,
    make_cells: MakeCells,
    small_vocabulary: GeneVocabulary,
    tmp_path: Path,
    container: str,
    layout: str,
) -> None:
    adata = make_cells(31)
    del adata.raw
    expected = by_scanpy(adata, small_vocabulary)
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
    options: dict[str, Any] = {}
    if container == "layer":
        adata.layers["counts"], adata.X = adata.X, adata.layers["other"]
        options = {"layer": "counts"}
    elif container == "raw":
        adata.raw = adata
        adata = adata[:, :5].copy()
        options = {"use_raw": True}
    path = tmp_path / ("cells.zarr" if container == "zarr-v3" else "cells.h5ad")
    write_zarr(adata, path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    cells = tokenize(path, shuffle=layout == "dense", **options)
    if layout == "dense":
        rows = np.random.default_rng(0).permutation(31)
        cells = cells.take(torch.from_numpy(rows))
    pd.testing.assert_frame_equal(as_table(cells), expected)


@pytest.fixture
def three_files(make_cells: MakeCells, tmp_path: Path) -> list[Path]:
    """Different genes in different orders, different columns of obs."""
    parts = [make_cells(33, 1)[:, 50:].copy(), make_cells(50, 2), make_cells(7, 3)[:, ::-1].copy()]
    del parts[0].obs["depth"]
    parts[1].obs["batch"] = "second"
    paths = [tmp_path / f"part{number}.h5ad" for number in range(3)]
    for part, path in zip(parts, paths, strict=True):
        part.write_h5ad(path)
    return paths


def test_inputs_with_different_genes_are_aligned(
    tokenize: Tokenize,
    three_files: list[Path],
    small_vocabulary: GeneVocabulary,
    output: Path,
) -> None:
    found = as_table(tokenize(three_files))
    parts = [anndata.read_h5ad(path) for path in three_files]
    starts = np.cumsum([0, *map(len, parts)])
    expected = [by_scanpy(part, small_vocabulary) for part in parts]
    for table, start in zip(expected, starts[:-1], strict=True):
        table["cell"] += start
    pd.testing.assert_frame_equal(found, pd.concat(expected, ignore_index=True))
    with TokenStore(output) as store:
        assert store.inputs == [str(path) for path in three_files]
        after, measured = store.read_obs(), store.measured()
    assert after.index.tolist() == [name for part in parts for name in part.obs_names]
    assert after["cellpatch_input"].tolist() == np.repeat(store.inputs, [33, 50, 7]).tolist()
    assert after["depth"].isna().sum() == 33
    for row, part in zip(measured, parts, strict=True):
        tokens = small_vocabulary.match(part.var_names).tokens
        assert np.array_equal(np.flatnonzero(row), np.unique(tokens[tokens >= 0]))
    assert measured.sum(1).tolist() == [GENES - 50, GENES, GENES]


@pytest.mark.parametrize("config", [CellPatchConfig(), CONTINUOUS])
def test_shuffled_store_is_a_permutation_of_cells_and_obs(
    tokenize: Tokenize, three_files: list[Path], output: Path, config: CellPatchConfig
) -> None:
    """As in memory: cell ``c`` goes to the row ``permutation[c]``."""
    cells = tokenize(three_files, config=config)
    with TokenStore(output) as store:
        before = store.read_obs()
        counts = store.counts
    shuffled = tokenize(three_files, config=config, shuffle=True, seed=5, overwrite=True)
    rows = np.random.default_rng(5).permutation(90)
    order = np.argsort(rows)
    assert (order != np.arange(90)).sum() > 80
    assert_same(shuffled, cells.take(torch.from_numpy(order)))
    with TokenStore(output) as store:
        pd.testing.assert_frame_equal(store.read_obs(), before.iloc[order])
        assert (store.shuffled, store.counts) == (5, counts)


def test_input_behind_an_address(
    tokenize: Tokenize, make_cells: MakeCells, tmp_path: Path, output: Path
) -> None:
    pytest.importorskip("fsspec")
    path = write_zarr(make_cells(31), tmp_path / "cells.zarr")
    expected = tokenize(path)
    with TokenStore(output) as store:
        assert store.inputs == [str(path)]
    assert_same(tokenize(path.as_uri(), overwrite=True), expected)
    with TokenStore(output) as store:
        assert store.inputs == [path.as_uri()]
        assert store.describe()["inputs"][0].startswith("cells.zarr: 31 cells")
    with pytest.raises(InputError, match="given twice"):
        tokenize([path.as_uri(), path.as_uri() + "/"])
    with pytest.raises(InputError, match="is an address: stores are written to folders"):
        cp.atlas.tokenize(path, output.as_uri(), vocabulary="human")


def test_a_seed_is_one_order(tokenize: Tokenize, cells_file: Path, output: Path) -> None:
    trees = []
    for seed in (3, 3, 4):
        tokenize(cells_file, shuffle=True, seed=seed)
        trees.append(tree(output))
        shutil.rmtree(output)
    assert trees[0] == trees[1] != trees[2]


def test_model_and_its_vocabulary_make_the_same_store(
    tokenize: Tokenize,
    cells_file: Path,
    small_model: CellPatch,
    model_directory: Path,
    output: Path,
) -> None:
    """What a store depends on is the vocabulary and the preprocessing, not the weights."""
    tokenize(cells_file)
    for model in (small_model, model_directory):
        assert cp.atlas.tokenize(cells_file, output, model=model).computed == 0
    path = model_directory / "vocabulary.json"
    assert cp.atlas.tokenize(cells_file, output, vocabulary=path).computed == 0


def test_human_vocabulary(cells_file: Path, output: Path) -> None:
    cp.atlas.tokenize(cells_file, output, vocabulary="human")
    with TokenStore(output) as store:
        assert store.vocabulary_fingerprint == GeneVocabulary.human().fingerprint


def test_dense_files_are_sized_by_a_sample(
    tokenize: Tokenize, make_cells: MakeCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else shuffling one would ask for room for its zeros."""
    adata = make_cells(101)
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "dense.h5ad")
    asked: list[int] = []

    def buckets(folder: Path, rows: np.ndarray, entries: int, *types: Any) -> Buckets:
        asked.append(entries)
        return Buckets(folder, rows, entries, *types)

    monkeypatch.setattr(tokenizing, "Buckets", buckets)
    tokenize(tmp_path / "dense.h5ad", shuffle=True)
    assert asked == [np.count_nonzero(adata.X)]


def test_summary(
    cells_file: Path,
    small_vocabulary: GeneVocabulary,
    output: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adata = anndata.read_h5ad(cells_file)
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        summary = cp.atlas.tokenize(str(cells_file), str(output), vocabulary=small_vocabulary)
    assert (summary.cells, summary.computed, summary.empty_cells) == (CELLS, CELLS, 1)
    assert (summary.genes_matched, summary.genes_unknown) == (GENES, 3)
    assert summary.unknown_entries == adata.X[:, GENES:].nnz
    assert summary.entries == adata.X[:, :GENES].nnz
    assert re.fullmatch(
        rf"{re.escape(str(output))}: 211 cells, {summary.entries:,} entries, 307 genes matched, "
        r"3 unknown, 1 empty cells, [\d,]+ cells/s",
        str(summary),
    )
    (line,) = caplog.messages
    assert line.startswith(f"{cells_file}: {GENES} of {GENES + 3} genes matched by the var index")


@pytest.mark.parametrize("rounding", ["round", "none"])
def test_tokens_embed_as_documented(
    cells_file: Path, small_vocabulary: GeneVocabulary, tmp_path: Path, rounding: str
) -> None:
    """Discrete values to the bit; continuous ones as far off as half precision is."""
    config = CellPatchConfig(
        max_genes=small_vocabulary.size,
        value_rounding=rounding,  # type: ignore[arg-type]
        value_clip=5 if rounding == "round" else None,
    )
    torch.manual_seed(11)
    model = CellPatch(config, small_vocabulary).eval()
    tokens, outputs = tmp_path / "tokens.zarr", [tmp_path / "one.zarr", tmp_path / "two.zarr"]
    cp.atlas.tokenize(cells_file, tokens, model=model)
    for data, output in zip([cells_file, tokens], outputs, strict=True):
        cp.atlas.embed(data, model, output)
    one, two = (anndata.read_zarr(output).obsm["X_cellpatch"] for output in outputs)
    if rounding == "round":
        assert np.array_equal(one, two)
    else:
        off = np.linalg.norm(one - two, axis=1) / np.linalg.norm(one, axis=1)
        assert 0 < off.max() < 5e-4
