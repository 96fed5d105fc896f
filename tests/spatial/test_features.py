"""What CellPatch sees of a spot: its first block; of a niche: the same, with biases."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from cellpatch_fast.kernels import EncoderWeights, reference
from scipy import sparse

from cellpatch_fast import CellPatch, RaggedCells
from cellpatch_fast.config import Reading
from cellpatch_fast.errors import InputError, InputWarning
from cellpatch_fast.spatial.expression import read_expression
from cellpatch_fast.spatial.features import (
    Components,
    PatchFeatures,
    as_written,
    cells_of,
    first_block,
    frozen_features,
    niche_features,
    variable_cells,
)
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph

from .conftest import GENES, SPOTS

WIDTH = 3 * 14  # of features: patches and their dimension


def exact_features(
    model: CellPatch, cells: RaggedCells, bias: np.ndarray | None = None
) -> np.ndarray:
    """Of the first block by the reference in float64, [cells, WIDTH]."""
    return _exact(first_block(model).double().encoder_weights(), cells, bias)


def _exact(
    weights: EncoderWeights, cells: RaggedCells, bias: np.ndarray | None = None
) -> np.ndarray:
    assert not weights.self_blocks
    assert weights.projection_weight is None
    attended = reference.patch_cross_attention(
        weights, cells.offsets, cells.genes, cells.values.double(),
        bias=None if bias is None else torch.from_numpy(bias),
    ).attended  # fmt: skip
    return reference.finish(weights, attended).features.detach().flatten(1).numpy()


@pytest.fixture
def cells(tissue: AnnData, tissue_model: CellPatch) -> RaggedCells:
    return cells_of(tissue, tissue_model)


def test_frozen_features_are_those_of_the_first_block(
    tissue: AnnData, tissue_model: CellPatch, cells: RaggedCells
) -> None:
    features = frozen_features(tissue, tissue_model)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, exact_features(tissue_model, cells), atol=2e-5)


def test_the_first_block_has_the_weights_of_the_model(tissue_model: CellPatch) -> None:
    state, whole = first_block(tissue_model).state_dict(), tissue_model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
    left_out = {name.split(".")[0] for name in whole.keys() - state.keys()}
    assert len(left_out) == 2  # self-attention and projection


def test_components_are_principal_ones(tissue: AnnData, tissue_model: CellPatch) -> None:
    features = frozen_features(tissue, tissue_model).astype(np.float64)
    reduced = frozen_features(tissue, tissue_model, components=5)
    u, s, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    expected = u[:, :5] * s[:5] / (s[0] / np.sqrt(SPOTS - 1))
    assert reduced.shape == (SPOTS, 5)
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=2e-4)
    assert reduced[:, 0].std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_components_of_a_sample_are_those_of_its_spots(
    tissue: AnnData, tissue_model: CellPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.spatial.features.SAMPLE", 60)
    monkeypatch.setattr("cellpatch_fast.spatial.features.STRETCHES", 4)
    features = frozen_features(tissue, tissue_model)
    sample = np.concatenate([np.arange(start, start + 15) for start in (0, 31, 63, 95)])
    expected = Components(features[sample], 5)(features)
    reduced = frozen_features(tissue, tissue_model, components=5)
    np.testing.assert_allclose(reduced, expected, atol=1e-4)


def test_there_are_no_more_components_than_numbers_or_spots() -> None:
    rows = np.random.default_rng(0).standard_normal((11, 7)).astype(np.float32)
    assert Components(rows, 30)(rows).shape == (11, 7)
    assert Components(rows[:3], 30)(rows).shape == (11, 3)


def test_components_of_equal_rows_are_zero() -> None:
    rows = np.full((11, 7), 0.1, np.float32)
    assert np.abs(Components(rows, 3)(rows)).max() < 1e-6


def test_trained_features_are_the_first_blocks_and_have_gradients(
    tissue_model: CellPatch, cells: RaggedCells
) -> None:
    parts = [cells.take(torch.arange(0, 61)), cells.take(torch.arange(61, SPOTS))]
    features = PatchFeatures(tissue_model, parts)
    assert features.width == WIDTH
    features(0).square().sum().backward()  # with dropout
    without = [n for n, p in features.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    features.eval()
    together = torch.cat([features(0), features(1)]).detach().numpy()
    np.testing.assert_allclose(together, exact_features(tissue_model, cells), atol=2e-5)
    assert not any(parameter.requires_grad and parameter.grad is not None
                   for parameter in tissue_model.parameters())  # fmt: skip


def test_variable_genes_are_attended_to_with_their_zeros(
    tissue: AnnData, tissue_model: CellPatch
) -> None:
    expression = read_expression(tissue, variable_genes=23, target_sum=1e4)
    cells = variable_cells(expression, tissue_model)
    known = [name in tissue_model.vocabulary.ensembl_ids for name in expression.genes]
    values = expression.matrix.toarray()[:, known]
    assert 20 < sum(known) <= 23
    assert (values == 0).any()
    assert cells.lengths.tolist() == [sum(known)] * SPOTS
    np.testing.assert_array_equal(cells.values.numpy().reshape(values.shape), values)
    tokens = tissue_model.vocabulary.match(list(expression.genes[known])).tokens
    assert np.array_equal(cells.genes.numpy().reshape(values.shape), np.tile(tokens, (SPOTS, 1)))


def test_variable_genes_are_matched_by_any_column(tissue: AnnData, tissue_model: CellPatch) -> None:
    expected = variable_cells(
        read_expression(tissue, variable_genes=23, target_sum=1e4), tissue_model
    )
    tissue.var["written"] = tissue.var_names
    tissue.var.index = [f"gene {i}" for i in range(GENES)]
    del tissue.var["feature_name"]
    expression = read_expression(tissue, variable_genes=23, target_sum=1e4)
    cells = variable_cells(expression, tissue_model, Reading(gene_column="written"))
    assert torch.equal(cells.genes, expected.genes)
    assert torch.equal(cells.values, expected.values)
    with pytest.raises(InputError, match="none of its 23 genes is in the vocabulary"):
        variable_cells(expression, tissue_model)


def test_zeros_of_a_model_with_bins_are_refused(tissue: AnnData, tissue_model: CellPatch) -> None:
    config = dataclasses.replace(tissue_model.config, value_embedding="binned")
    expression = read_expression(tissue, variable_genes=23, target_sum=1e4)
    with pytest.raises(InputError, match="but this one has bins: use attended='non-zero'"):
        variable_cells(expression, CellPatch(config, tissue_model.vocabulary))


# --- niches --------------------------------------------------------------------------------------


def exact_niches(
    model: CellPatch, cells: RaggedCells, graph: SpatialGraph, sigma: float
) -> np.ndarray:
    """Spot by spot: its entries and its neighbours', with their bias, in float64."""
    distances, rows = graph.distances.toarray(), []
    weights = first_block(model).double().encoder_weights()
    for spot in range(len(graph)):
        members = [spot, *np.flatnonzero(distances[spot])]
        niche = cells.take(torch.tensor(members))
        bias = -(distances[spot, members] ** 2) / (2 * sigma**2)
        entries = np.repeat(bias, niche.lengths.numpy())
        one = RaggedCells(torch.tensor([0, len(niche.genes)]), niche.genes, niche.values)
        rows.append(_exact(weights, one, entries))
    return np.concatenate(rows)


@pytest.mark.parametrize("sigma", [None, 71.0])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_niches_are_attended_to_with_a_bias_by_distance(
    tissue_model: CellPatch, cells: RaggedCells, places: np.ndarray, sigma: float | None,
    backend: str,
) -> None:  # fmt: skip
    graph = spatial_graph(places, kind="nearest", neighbours=7)
    features = niche_features(cells, tissue_model, graph, sigma=sigma, backend=backend)
    used = float(graph.distances.data.mean()) if sigma is None else sigma
    expected = exact_niches(tissue_model, cells, graph, used)
    np.testing.assert_allclose(features, expected, atol=2e-5)
    assert np.abs(features - exact_features(tissue_model, cells)).max() > 1e-3


def test_niches_without_neighbours_are_the_spots(
    tissue_model: CellPatch, cells: RaggedCells, graph: SpatialGraph
) -> None:
    expected = exact_features(tissue_model, cells)
    empty = SpatialGraph(
        sparse.csr_matrix((SPOTS, SPOTS)), "radius", 1.0, np.zeros(SPOTS, np.int64)
    )
    for features in (
        niche_features(cells, tissue_model, graph, sigma=0),
        niche_features(cells, tissue_model, graph, sigma=1e-6),
        niche_features(cells, tissue_model, empty),
        niche_features(cells, tissue_model, empty, sigma=3.0),
    ):
        np.testing.assert_allclose(features, expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_spot_that_expresses_nothing_has_finite_features(
    tissue_model: CellPatch, cells: RaggedCells, graph: SpatialGraph, backend: str
) -> None:
    """Alone it attends to nothing; among neighbours, to them."""
    counts = cells.lengths.clone()
    counts[[0, 53]] = 0
    kept = torch.repeat_interleave(counts > 0, cells.lengths)
    emptied = RaggedCells(
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        cells.genes[kept], cells.values[kept],
    )  # fmt: skip
    alone = niche_features(emptied, tissue_model, graph, sigma=0, backend=backend)
    np.testing.assert_allclose(alone, exact_features(tissue_model, emptied), atol=2e-5)
    among = niche_features(emptied, tissue_model, graph, backend=backend)
    sigma = float(graph.distances.data.mean())
    expected = exact_niches(tissue_model, emptied, graph, sigma)
    np.testing.assert_allclose(among, expected, atol=2e-5)


def test_permuting_spots_permutes_niches(
    tissue_model: CellPatch, cells: RaggedCells, places: np.ndarray
) -> None:
    order = np.random.default_rng(0).permutation(SPOTS)
    expected = niche_features(cells, tissue_model, spatial_graph(places))[order]
    permuted = niche_features(
        cells.take(torch.from_numpy(order)), tissue_model, spatial_graph(places[order])
    )
    np.testing.assert_allclose(permuted, expected, atol=1e-5)


@pytest.mark.parametrize("entries", [1, 1_009])
def test_batches_of_niches_change_nothing(
    tissue_model: CellPatch, cells: RaggedCells, graph: SpatialGraph, entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = niche_features(cells, tissue_model, graph)
    monkeypatch.setattr("cellpatch_fast.spatial.features.NICHE_ENTRIES", entries)
    features = niche_features(cells, tissue_model, graph)
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sigma", [-1.0, np.nan, np.inf])
def test_a_width_that_is_none_is_refused(
    tissue_model: CellPatch, cells: RaggedCells, graph: SpatialGraph, sigma: float
) -> None:
    with pytest.raises(InputError, match="sigma must be positive and finite, or 0"):
        niche_features(cells, tissue_model, graph, sigma=sigma)


def test_padding_that_a_model_was_trained_with_is_attended_to(
    tissue: AnnData, tissue_model: CellPatch
) -> None:
    """A model of the original code: features of a niche of one spot are still the spot's."""
    config = dataclasses.replace(tissue_model.config, padded_length=2 * GENES)
    padded = CellPatch(config, tissue_model.vocabulary)
    padded.load_state_dict(tissue_model.state_dict())
    cells = cells_of(tissue, padded)
    graph = spatial_graph(np.asarray(tissue.obsm["spatial"]))
    alone = niche_features(cells, padded, graph, sigma=0)
    np.testing.assert_allclose(alone, frozen_features(tissue, padded), atol=2e-5)


# --- names of mouse genes ------------------------------------------------------------------------


def with_mouse_names(tissue: AnnData) -> AnnData:
    mouse = tissue.copy()
    mouse.var = mouse.var.set_index(mouse.var["feature_name"].str.capitalize())[[]]
    return mouse


def written(data: Any, model: CellPatch, **reading: Any) -> CellPatch:
    with pytest.warns(InputWarning, match="1 of 41 genes .* but 40 are if .* capitals"):
        return as_written(data, model, Reading(**reading))


def test_mouse_genes_are_taken_for_the_human_ones_of_that_name(
    tissue: AnnData, tissue_model: CellPatch, tmp_path: Path
) -> None:
    expected = frozen_features(tissue, tissue_model)
    mouse = with_mouse_names(tissue)
    mouse.var_names = [*mouse.var_names[:7], tissue.var_names[7], *mouse.var_names[8:]]
    mouse.raw, mouse.layers["counts"] = mouse, mouse.X
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    for data in (mouse, tmp_path / "mouse.h5ad"):
        for reading in ({}, {"layer": "counts"}, {"use_raw": True}):
            model = written(data, tissue_model, **reading)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                features = frozen_features(data, model, reading=Reading(**reading))
            assert np.array_equal(features, expected)


def test_mouse_genes_in_a_column_are_too(tissue: AnnData, tissue_model: CellPatch) -> None:
    expected = frozen_features(tissue, tissue_model)
    mouse = with_mouse_names(tissue)
    mouse.var["symbols"] = mouse.var_names
    mouse.var.index = [f"ENSMUSG{i:011}" for i in range(GENES)]
    with pytest.warns(InputWarning, match="0 of 41 genes .* but 40 are"):
        model = as_written(mouse, tissue_model)
    assert np.array_equal(frozen_features(mouse, model), expected)


def test_names_that_a_model_knows_stay(tissue: AnnData, tissue_model: CellPatch) -> None:
    assert as_written(tissue, tissue_model) is tissue_model
    symbols = tissue.copy()
    symbols.var_names = [*tissue.var["feature_name"][:20], *with_mouse_names(tissue).var_names[20:]]
    assert as_written(symbols, tissue_model) is tissue_model  # half are known as they are
