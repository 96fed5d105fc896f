"""Token stores in the loader give the cells that the AnnData they were made of gives."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scanpy as sc
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellpatch_fast import (
    CellPatch,
    CellPatchConfig,
    GeneVocabulary,
    InputError,
    RaggedCells,
    atlas,
    pp,
)
from cellpatch_fast.config import Preprocessing
from cellpatch_fast.inference.embedder import Embedder
from cellpatch_fast.loading import CellLoader

from ..io.stores.token_files import LARGE_VOCABULARY, VOCABULARY, write_store
from ..io.stores.token_files import make_cells as make_tokens
from .batches import assert_same, assert_same_batches, in_file_order, load, together
from .conftest import MakeStore

CONTINUOUS = CellPatchConfig(value_rounding="none", value_clip=None)


few = settings(deadline=None, max_examples=7, suppress_health_check=[HealthCheck.too_slow])


# --- the same cells ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the . ranks get")
@few
@given(
    chunk_entries=st.integers(17, 400) | st.integers(400, 40_000),
    shard_entries=st.integers(1_500, 20_000),
    batch_size=st.integers(1, 300),
    shuffle=st.booleans(),
    block_size=st.integers(1, 70),
    buffer_size=st.integers(1, 300),
    rank=st.integers(0, 2),
    threads=st.integers(1, 4),
)
def test_batches_are_those_of_the_anndata_file(
    file: Path,
    small_model: CellPatch,
    tokens: RaggedCells,
    chunk_entries: int,
    shard_entries: int,
    **options: Any,
) -> None:
    """Whatever the chunks, and however an epoch is cut and ordered."""
    options["world_size"] = 3
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "tokens.zarr"
        sizes: dict[str, Any] = {
            "chunk_entries": chunk_entries,
            "shard_chunks": -(-shard_entries // chunk_entries),
        }
        write_store(store, tokens, vocabulary=small_model.vocabulary, **sizes)
        batches = load(store, small_model, **options)
    assert_same_batches(batches, load(file, small_model, **options))


@pytest.mark.parametrize("max_entries", [1, 100, 307, 5_000])
def test_batches_by_entries_are_those_of_the_anndata_file(
    store: Path, tokens: RaggedCells, max_entries: int
) -> None:
    """A cell that has more is a batch of its expressed_genes."""
    batches = load(store, batch_size=50, max_entries=max_entries)
    assert_same(together(batches), tokens)
    alone = [batch for batch in batches if batch.cells.entries > max_entries]
    assert all(len(batch.cells) == 1 for batch in alone)
    assert len(alone) == (tokens.lengths > max_entries).sum()


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_round_trip_gives_scanpys_values(
    adata: anndata.AnnData,
    file: Path,
    make_store: MakeStore,
    small_vocabulary: GeneVocabulary,
    discrete: bool,
) -> None:
    """Genes that a cell does not express have no entry; those that become 0 have one."""
    store = make_store(file, config=None if discrete else CONTINUOUS)
    batches = load(store, batch_size=17, shuffle=True)
    values = anndata.AnnData(adata.X.astype(np.float64), var=adata.var)
    with warnings.catch_warnings(action="ignore"):  # there is an empty cell
        sc.pp.normalize_total(values, target_sum=1e4)
    sc.pp.log1p(values)
    matched = small_vocabulary.match(adata.var_names).tokens
    expected = np.full((len(adata), small_vocabulary.size), np.nan)
    expected[:, matched[matched >= 0]] = np.where(
        (adata.X != 0).toarray(), values.X.toarray(), np.nan
    )[:, matched >= 0]
    if discrete:
        expected = np.rint(expected.clip(max=5))
    values = np.full_like(expected, np.nan)
    for batch in batches:
        assert batch.cells.values.dtype == (torch.uint8 if discrete else torch.float16)
        rows = np.repeat(batch.rows, batch.cells.lengths.numpy())
        values[rows, batch.cells.genes.numpy().astype(int)] = batch.cells.values.numpy()
    np.testing.assert_allclose(values, expected, rtol=0 if discrete else 2**-11, atol=0)


def test_continuous_tokens_are_the_same_in_half_precision(
    adata: anndata.AnnData, file: Path, make_store: MakeStore, small_vocabulary: GeneVocabulary
) -> None:
    expected = pp.tokenize(adata, small_vocabulary, CONTINUOUS)
    expected = RaggedCells(expected.offsets, expected.genes, expected.values.half())
    store = make_store(file, config=CONTINUOUS)
    assert_same(together(load(store, batch_size=29)), expected)
    twice = in_file_order(load([store, store], batch_size=29, shuffle=True, buffer_size=90))
    assert_same(twice, RaggedCells.concatenate([expected, expected]))


def test_large_vocabularies_have_tokens_of_32_bits(tmp_path: Path) -> None:
    cells = make_tokens([5, 0, 1_071, 1, 13], size=LARGE_VOCABULARY.size)
    assert int(cells.genes.max()) > 1 << 16
    path = tmp_path / "tokens.zarr"
    write_store(path, cells, vocabulary=LARGE_VOCABULARY, chunk_entries=101)
    batches = load(path, batch_size=2, shuffle=True, vocabulary=LARGE_VOCABULARY)
    assert batches[0].cells.genes.dtype == torch.int32
    assert_same(in_file_order(batches), cells)


# --- embedding ---------------------------------------------------------------------------------


def test_embeddings_of_a_store_are_those_of_the_anndata(
    file: Path, store: Path, small_model: CellPatch, tmp_path: Path
) -> None:
    """Bit for bit."""
    embedder = Embedder(small_model)
    features = []
    for data in (file, store):
        stream = embedder.open(data)
        features.append(np.concatenate([cells.features for cells in embedder.run([stream])]))
        stream.close()
    np.testing.assert_array_equal(features[1], features[0])
    summary = atlas.embed(store, small_model, tmp_path / "out.zarr")
    assert summary.cells == len(features[0])
    written = anndata.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_array_equal(written.obsm["X_cellpatch"], features[0])
    assert list(written.obs_names) == list(anndata.read_h5ad(file).obs_names)


def test_a_store_of_continuous_values_is_embedded(
    file: Path, make_store: MakeStore, small_vocabulary: GeneVocabulary
) -> None:
    """Half precision in the store moves an embedding by as much as it moves the values."""
    config = CellPatchConfig(
        max_genes=small_vocabulary.size, value_rounding="none", value_clip=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        embedder = Embedder(CellPatch(config, small_vocabulary).eval())
    features = []
    for data in (file, make_store(file, model=embedder.model, vocabulary=None)):
        stream = embedder.open(data)
        features.append(np.concatenate([cells.features for cells in embedder.run([stream])]))
        stream.close()
    difference = np.linalg.norm(features[1] - features[0], axis=1)
    assert (difference <= 2**-11 * np.linalg.norm(features[0], axis=1)).all()


# --- what does not fit -------------------------------------------------------------------------


def test_another_vocabulary_is_refused(store: Path, small_model: CellPatch) -> None:
    with pytest.raises(InputError) as caught:
        CellLoader(store, VOCABULARY, small_model.config)
    for vocabulary in (VOCABULARY, small_model.vocabulary):
        assert vocabulary.fingerprint[:12] in str(caught.value)
    assert "cellpatch tokenize --model" in str(caught.value)


def test_another_preprocessing_is_refused(store: Path, small_vocabulary: GeneVocabulary) -> None:
    config = CellPatchConfig(target_sum=1e6)
    with pytest.raises(InputError) as caught:
        CellLoader(store, small_vocabulary, config)
    for preprocessing in (Preprocessing(), Preprocessing.from_config(config)):
        assert str(preprocessing) in str(caught.value)
    for command in ("cellpatch tokenize --model DIR", "cellpatch tokenize --few-cells"):
        assert command in str(caught.value)


@pytest.mark.parametrize("what", ["vocabularies", "preprocessing", "precision"])
def test_stores_that_do_not_fit_each_other_are_refused(
    store: Path,
    file: Path,
    make_store: MakeStore,
    tmp_path: Path,
    what: str,
    small_vocabulary: GeneVocabulary,
) -> None:
    options: dict[str, Any] = {}
    if what == "vocabularies":
        other, message = tmp_path / "other.zarr", "have different vocabularies"
        write_store(other, make_tokens([5, 3]))
    elif what == "preprocessing":
        other, message = make_store(file, config=CONTINUOUS), "were prepared differently"
    else:
        store, other = make_store(file, config=CONTINUOUS), file
        options = {"vocabulary": small_vocabulary, "config": CONTINUOUS}
        message = "store values as float16 and float32"
    with pytest.raises(InputError, match=message) as caught:
        CellLoader([store, other], **options)
    assert str(store) in str(caught.value)
    assert str(other) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer": "counts"}, "no layer"),
        ({"gene_column": "symbol"}, "no gene_column"),
        ({"use_raw": True}, "no use_raw"),
        ({"layer": "counts", "input": "counts"}, "no layer and no input"),
    ],
)
def test_options_of_anndata_are_refused(store: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"is a token store, which has {named}: leave that out"):
        CellLoader(store, **options)


def test_nothing_given_is_refused() -> None:
    with pytest.raises(InputError, match="no input was given"):
        CellLoader([])
