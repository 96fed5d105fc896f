"""Training cells as a sparse matrix: which, what is in it, and its components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from cellpatch_fast import CellPatchConfig, GeneVocabulary, atlas
from cellpatch_fast.training import expression
from cellpatch_fast.training.expression import components, gather, gene_weights, seen

from ..conftest import write_zarr
from .conftest import stream_of

EPSILON = 2.0**-52

Gather = Callable[..., expression.Expression]


@pytest.fixture
def gathered(small_vocabulary: GeneVocabulary, unrounded: CellPatchConfig) -> Gather:
    """``gathered(inputs, rows, seed=0)``: their values."""

    def run(data: Any, rows: np.ndarray, seed: int = 0) -> expression.Expression:
        with stream_of(data, small_vocabulary, unrounded) as stream:
            return gather([stream], rows, small_vocabulary.size, seed)

    return run


def random_values(seed: int, cells: int = 23, genes: int = 19) -> csr_array:
    """Most genes are not in most cells; gene 0 is padding."""
    random = np.random.default_rng(seed)
    found = random.exponential(2, (cells, genes)) * (random.random((cells, genes)) < 0.4)
    found[:, 0] = 0
    return csr_array(found.astype(np.float32))


# --- which cells, and their values --------------------------------------------------------------


def test_values_are_logarithms_of_normalised_counts(
    gathered: Gather, labelled: anndata.AnnData, small_vocabulary: GeneVocabulary
) -> None:
    rows = np.array([2, 3, 71, 140])
    found = gathered(labelled, rows)
    counts = labelled.X[rows].astype(float)
    totals = counts.sum(axis=1, keepdims=True)  # of all genes, known or not
    expected = np.log1p(1e4 * counts / totals)[:, : len(small_vocabulary)]
    assert np.array_equal(found.rows, rows)
    assert found.values.shape == (4, small_vocabulary.size)
    np.testing.assert_allclose(found.values.toarray()[:, 1:], expected, rtol=4 * 2**-24)
    assert not found.values.toarray()[:, 0].any()


def test_the_same_cells_are_the_same_from_any_format(
    gathered: Gather, labelled: anndata.AnnData, file: Path, tmp_path: Path,
    small_vocabulary: GeneVocabulary, unrounded: CellPatchConfig,
) -> None:  # fmt: skip
    """A token store holds float16: values are those of the others, rounded once."""
    rows = np.arange(3, 147, 2)
    store = tmp_path / "tokens.zarr"
    atlas.tokenize(file, store, vocabulary=small_vocabulary, config=unrounded, shuffle=False)
    expected = gathered(file, rows).values
    for other in (labelled, write_zarr(labelled, tmp_path / "cells.zarr")):
        assert np.array_equal(gathered(other, rows).values.toarray(), expected.toarray())
    rounded = expected.toarray().astype(np.float16).astype(np.float32)
    assert np.array_equal(gathered(store, rows).values.toarray(), rounded)


spans = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 11)), max_size=9)


@given(spans, st.integers(1, 60), st.integers(0, 99))
def test_a_sample_of_ranges_is_that_of_their_rows(
    gaps_and_lengths: list[tuple[int, int]], most: int, seed: int
) -> None:
    starts, stops, place = [], [], 0
    for gap, length in gaps_and_lengths:
        starts.append(place + gap)
        stops.append(place + gap + length)
        place += gap + length
    ranges = np.array([starts, stops], np.int64).T
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in ranges)])
    found = expression._sampled(ranges, most, seed)
    assert np.array_equal(found, expression._sampled(rows, most, seed))
    assert len(found) == min(most, len(rows))
    assert (np.diff(found) > 0).all()
    assert set(found) <= set(rows)


def test_memory_is_bounded_by_a_sample(
    gathered: Gather, labelled: anndata.AnnData, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ranges = np.array([[0, 50], [61, 147]])
    rows = np.r_[0:50, 61:147]
    whole = gathered(labelled, ranges)
    assert np.array_equal(whole.rows, rows)
    entries = int((labelled.X > 0).sum())  # of a dense matrix, whose zeros are none
    monkeypatch.setattr(expression, "MOST_ENTRIES", entries // 4)
    with caplog.at_level("INFO", "cellpatch_fast"):
        some = gathered(labelled, ranges)
    number = len(some.rows)
    assert number == 36  # a quarter of all, rounded down
    assert f"a sample of {number} of 136 cells stands for all of them" in caplog.text
    assert (np.diff(some.rows) > 0).all()
    places = np.searchsorted(rows, some.rows)
    assert np.array_equal(rows[places], some.rows)
    assert np.array_equal(some.values.toarray(), whole.values.toarray()[places])
    assert np.array_equal(gathered(labelled, rows).rows, some.rows)
    assert not np.array_equal(gathered(labelled, rows, seed=1).rows, some.rows)
    monkeypatch.setattr(expression, "MOST_ENTRIES", 1)  # less than a cell
    assert len(gathered(labelled, rows).rows) == 1


# --- what linear algebra finds in them ----------------------------------------------------------


@given(st.integers(0, 99))
def test_what_attention_sees_are_softmaxes_of_half_the_values(seed: int) -> None:
    values = random_values(seed)
    values = csr_array(values[np.r_[0:5, 5:23]])
    dense = values.toarray().astype(float)
    powers = np.where(dense > 0, np.exp(dense / 2), 0.0)
    sums = powers.sum(axis=1, keepdims=True)
    found, scale = seen(values)
    assert scale == pytest.approx(sums[sums > 0].mean(), rel=1e-12)
    expected = scale * powers / np.where(sums > 0, sums, 1.0)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-12)


def test_a_gene_that_a_cell_has_twice_is_seen_twice() -> None:
    twice = csr_array((np.array([1, 3, 2], np.float32), [4, 4, 2], [0, 3, 3]), shape=(2, 5))
    found, scale = seen(twice)
    powers = np.exp([0.5, 1.5, 1.0])
    assert scale == pytest.approx(powers.sum())
    np.testing.assert_allclose(
        found.toarray(), [[0, 0, powers[2], 0, powers[0] + powers[1]], [0] * 5], rtol=1e-12
    )


def test_genes_in_fewer_than_3_cells_or_without_variance_weigh_nothing() -> None:
    dense = np.zeros((7, 5))
    dense[:2, 1] = 5.0, 3.0  # two cells
    dense[:3, 2] = 5.0, 3.0, 1.0  # three
    dense[:, 3] = 0.7  # all alike
    dense[:, 4] = np.arange(7) + 1.0
    mean, weights = gene_weights(csr_array(dense))
    np.testing.assert_allclose(mean, dense.mean(axis=0), rtol=1e-12)
    assert np.flatnonzero(weights).tolist() == [2, 4]
    np.testing.assert_allclose(weights[[2, 4]], dense.std(axis=0)[[2, 4]] ** -0.5, rtol=1e-12)


@pytest.mark.parametrize("number", [1, 5, 16])
@pytest.mark.parametrize("shape", [(23, 19), (17, 29), (101, 53)])
@pytest.mark.parametrize("seed", [0, 1])
def test_components_are_those_of_the_dense_matrix(
    number: int, shape: tuple[int, int], seed: int
) -> None:
    matrix = csr_array(random_values(seed, *shape), dtype=np.float64)
    dense = matrix.toarray()
    kept = (dense > 0).sum(axis=0) >= 3
    weights = np.zeros(shape[1])
    weights[kept] = dense.std(axis=0)[kept] ** -0.5
    left, expected, right = np.linalg.svd((dense - dense.mean(axis=0)) * weights)
    number = min(number, kept.sum() - 1)
    found = components(matrix, number, seed)
    # ARPACK finds eigenvalues of the Gram matrix to its rounding; vectors turn by that over gaps
    rounding = 100 * max(shape) * EPSILON * expected[0] ** 2
    gaps = np.abs(np.subtract.outer(expected**2, expected**2))
    np.fill_diagonal(gaps, np.inf)
    bounds = rounding / gaps.min(axis=0)[:number]
    np.testing.assert_allclose(found.mean, dense.mean(axis=0), rtol=1e-12)
    assert (abs(found.singular_values - expected[:number]) <= rounding / expected[:number]).all()
    assert (np.diff(found.singular_values) <= 0).all()
    directions = np.zeros_like(found.loadings)
    directions[kept] = found.loadings[kept] / weights[kept, None]
    assert not found.loadings[~kept].any()
    strongest = directions[np.abs(directions).argmax(axis=0), np.arange(number)]
    assert (strongest > 0).all()
    signs = np.sign((directions * right[:number].T).sum(axis=0))
    errors = np.linalg.norm(directions - signs * right[:number].T, axis=0)
    assert (errors <= bounds).all()
    scores = signs * left[:, :number] * expected[:number]
    errors = np.linalg.norm(found.scores(matrix) - scores, axis=0)
    assert (errors <= 2 * expected[0] * bounds).all()


@pytest.mark.parametrize("kind", ["alike", "empty", "one cell", "one gene"])
def test_where_nothing_varies_there_are_no_components(kind: str) -> None:
    dense = np.zeros((7, 5))
    if kind == "alike":
        dense[:] = np.arange(5)
    elif kind == "one cell":
        dense = np.arange(5.0)[None]
    elif kind == "one gene":
        dense[:, 3] = np.arange(7)
    found = components(csr_array(dense), 3, seed=0)
    assert found.loadings.shape == (5, 0)
    assert found.scores(csr_array(dense)).shape == (len(dense), 0)


def test_components_are_no_more_than_the_cells_differ_in() -> None:
    """Three kinds of cells, equal within: two components, whatever is asked for."""
    kinds = random_values(0, cells=3, genes=31).toarray()
    kinds[:, 1:12] += 1.0
    found = components(csr_array(kinds[np.arange(29) % 3], dtype=np.float64), 11, seed=0)
    assert found.loadings.shape[1] == 2
