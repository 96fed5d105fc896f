"""Several inputs follow each other as one, whatever they are, and no cell comes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellpatch_fast import (
    CellPatch,
    RaggedCells,
)
from cellpatch_fast.loading import CellLoader
from cellpatch_fast.preprocessing.masking import Masking

from ..conftest import GENES, MakeCells
from .batches import assert_same, assert_same_batches, in_file_order, load, together
from .conftest import MakeStore

SIZES = [31, 1, 67, 13]  # cells of several files

few = settings(deadline=None, max_examples=7, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def files(make_cells: MakeCells, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of odd sizes whose genes differ: all, in another order, the first half, some."""
    folder = tmp_path_factory.mktemp("several")
    genes = [slice(None), slice(None, None, -1), slice(GENES // 2), slice(3, None, 5)]
    paths = []
    for seed, (cells, part) in enumerate(zip(SIZES, genes, strict=True)):
        paths.append(folder / f"{seed}.h5ad")
        make_cells(cells, seed)[:, part].copy().write_h5ad(paths[-1])
    return paths


def test_stores_and_files_follow_each_other(
    files: list[Path], several: list[Path], make_store: MakeStore, small_model: CellPatch
) -> None:
    mixed = [make_store(files[:2]), files[2], several[3]]
    for inputs, shuffle in [(several, False), (several, True), (mixed, False), (mixed, True)]:
        options: dict[str, Any] = {"batch_size": 11, "shuffle": shuffle, "obs": ["kind", "depth"]}
        expected = load(files, small_model, **options)
        batches = load(inputs, small_model, **options)
        assert_same_batches(batches, expected)
        for batch, other in zip(batches, expected, strict=True):
            assert batch.obs.keys() == {"kind", "depth"}
            for name, column in batch.obs.items():
                np.testing.assert_array_equal(column, other.obs[name])


def test_a_store_of_several_inputs_knows_what_each_measured(
    files: list[Path], make_store: MakeStore, small_model: CellPatch
) -> None:
    """Masks are those of the files; zeros are genes of the cell's own input that it lacks."""
    options: dict[str, Any] = {"masking": Masking(zeros=7.0), "batch_size": 23}
    store = make_store(files)
    batches = load(store, small_model, **options)
    assert_same_batches(batches, load(files, small_model, **options))
    sources = np.repeat(np.arange(len(SIZES)), SIZES)
    names = [anndata.read_h5ad(path, backed="r").var_names for path in files]
    known_tokens = [small_model.vocabulary.match(genes).tokens for genes in names]
    expressed = together(load(store))
    zeros = 0
    for batch in batches:
        assert batch.targets is not None
        for cell, row in enumerate(batch.rows):
            target = batch.targets.slice(cell, cell + 1)
            expressed_genes = expressed.slice(int(row), int(row) + 1).genes.numpy()
            drawn = np.setdiff1d(target.genes.numpy(), expressed_genes)
            assert np.isin(drawn, known_tokens[sources[row]]).all()
            zeros += len(drawn)
        assert batch.mask_counts is not None
        zeros -= batch.mask_counts.zeros
    assert zeros == 0  # all of them were looked at


def test_a_shuffled_store_says_which_input_a_cell_is_from(
    files: list[Path], make_store: MakeStore, small_model: CellPatch
) -> None:
    store = make_store(files, shuffle=True, seed=5)
    rows = np.random.default_rng(5).permutation(sum(SIZES))
    expected = together(load(files, small_model)).take(torch.from_numpy(np.argsort(rows)))
    with CellLoader(store, batch_size=19, obs=["cellpatch_input"]) as loader:
        batches = list(loader)
        names = loader.categories["cellpatch_input"]
    assert_same(together(batches), expected)
    sources = np.repeat(np.arange(len(SIZES)), SIZES)[np.argsort(rows)]
    for batch in batches:
        inputs = names[batch.obs["cellpatch_input"]]
        assert inputs.tolist() == [str(files[source]) for source in sources[batch.rows]]


@pytest.mark.filterwarnings("ignore:the . ranks get")
@few
@given(
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 60),
    block_size=st.integers(1, 40),
    buffer_size=st.integers(1, 150),
    shuffle=st.booleans(),
    max_entries=st.none() | st.integers(50, 3_000),
)
def test_every_cell_comes_exactly_once(
    several: list[Path],
    several_tokens: RaggedCells,
    small_model: CellPatch,
    world_size: int,
    **options: Any,
) -> None:
    """Cells longer than ``max_entries`` too, whatever the ranks and the sizes of the files."""
    batches = [
        batch
        for rank in range(world_size)
        for batch in load(several, small_model, rank=rank, world_size=world_size, **options)
    ]
    rows = np.sort(np.concatenate([batch.rows for batch in batches]))
    np.testing.assert_array_equal(rows, np.arange(sum(SIZES)))
    assert_same(in_file_order(batches), several_tokens)
    assert all(len(batch.cells) <= options["batch_size"] for batch in batches)


@pytest.fixture(scope="module")
def several(files: list[Path], make_store: MakeStore) -> list[Path]:
    """Stores and files, of odd sizes."""
    return [make_store(files[0]), files[1], make_store(files[2]), files[3]]


@pytest.fixture(scope="module")
def several_tokens(several: list[Path], small_model: CellPatch) -> RaggedCells:
    return together(load(several, small_model))


@few
@given(world_size=st.integers(1, 5), batch_size=st.integers(1, 40), shuffle=st.booleans())
def test_drop_last_leaves_out_what_fills_no_batch(
    several: list[Path],
    several_tokens: RaggedCells,
    small_model: CellPatch,
    world_size: int,
    batch_size: int,
    shuffle: bool,
) -> None:
    """Every rank has as many batches, all of them full, and no cell comes twice."""
    options: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": True}
    options |= {"world_size": world_size, "buffer_size": 50}
    full = sum(SIZES) // (world_size * batch_size)
    seen = []
    for rank in range(world_size):
        batches = load(several, small_model, rank=rank, **options)
        assert [len(batch.cells) for batch in batches] == [batch_size] * full
        for batch in batches:
            assert_same(batch.cells, several_tokens.take(torch.from_numpy(batch.rows)))
            seen.append(batch.rows)
    rows = np.concatenate([np.empty(0, int), *seen])
    assert len(np.unique(rows)) == len(rows) == full * world_size * batch_size
