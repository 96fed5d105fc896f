"""Generated tissues: Visium's grid, layers that are bands, counts that tell of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from cellpatch_fast import GeneVocabulary, InputError
from cellpatch_fast.datasets import synthetic_tissue
from cellpatch_fast.spatial.graphs import spatial_graph


def test_spots_are_those_of_visiums_grid() -> None:
    tissue = synthetic_tissue(317, genes=7)
    assert tissue.n_obs == pytest.approx(317, rel=0.05)
    places = tissue.obsm["spatial"]
    array = tissue.obs[["array_row", "array_col"]].to_numpy()
    assert ((array.sum(axis=1) % 2) == 0).all()
    width, height = np.ptp(places, axis=0)
    assert 0.8 < width / height < 1.25
    apart = cdist(places, places)
    np.testing.assert_allclose(np.where(apart == 0, np.inf, apart).min(axis=1), 100)
    by_radius, by_grid = spatial_graph(places), spatial_graph(array, kind="grid")
    assert np.array_equal(by_radius.distances.indices, by_grid.distances.indices)


def test_layers_are_bands_one_after_the_other() -> None:
    tissue = synthetic_tissue(1_009, layers=5, genes=7)
    layer = tissue.obs["layer"].cat.codes.to_numpy()
    assert list(tissue.obs["layer"].cat.categories) == [f"layer {i}" for i in range(1, 6)]
    assert np.bincount(layer).min() > 50
    rows, columns = spatial_graph(tissue.obsm["spatial"]).distances.nonzero()
    across = np.abs(layer[rows] - layer[columns])
    assert across.max() == 1  # a layer borders on the next only
    assert (across == 0).mean() > 0.75


def test_counts_are_counts_of_human_genes() -> None:
    tissue = synthetic_tissue(101, genes=307)
    assert sparse.issparse(tissue.X)
    assert tissue.X.dtype == np.float32
    assert (tissue.X.data == np.round(tissue.X.data)).all()
    assert tissue.X.data.min() == 1
    match = GeneVocabulary.human().match(list(tissue.var_names))
    assert match.matched == tissue.n_vars == 307
    assert not match.duplicated
    means = np.asarray(tissue.X.mean(axis=0)).ravel()
    assert means[:100].mean() > 2 * means[-100:].mean()  # the most common first


def test_depth_scales_the_counts() -> None:
    shallow, deep = (synthetic_tissue(211, genes=211, depth=depth).X.sum() for depth in (1, 3))
    assert deep / shallow == pytest.approx(3, rel=0.1)


def test_markers_tell_layers_and_without_them_nothing_does() -> None:
    def accuracy(marker_fold: float) -> float:
        tissue = synthetic_tissue(503, layers=3, genes=503, marker_fold=marker_fold)
        values = np.log1p(tissue.X.toarray())
        model = LogisticRegression(C=0.01, max_iter=300)
        return float(cross_val_score(model, values, tissue.obs["layer"], cv=3).mean())

    assert accuracy(8.0) > 0.75
    assert accuracy(1.0) < 0.5


def test_a_seed_is_a_tissue() -> None:
    one, two, other = (synthetic_tissue(53, genes=101, seed=seed).X for seed in (3, 3, 5))
    assert (one != two).nnz == 0
    assert (one != other).nnz > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spots": 3}, "spots must be at least 4, found 3"),
        ({"layers": 0}, "layers must be at least 1, found 0"),
        ({"genes": 0}, "genes must be at least 1, found 0"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
        ({"depth": -1.0}, "depth must be positive and finite, found -1"),
        ({"depth": float("nan")}, "depth must be positive and finite, found nan"),
        ({"marker_fold": 0.0}, "marker_fold must be positive and finite, found 0"),
        ({"genes": 10**6}, r"genes must be at most [\d,]+, found 1,?000,?000"),
    ],
)
def test_what_makes_no_tissue_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthetic_tissue(**{"spots": 53, "genes": 7} | options)


def test_the_smallest_tissues_are_tissues() -> None:
    assert synthetic_tissue(4, layers=1, genes=1).shape == (4, 1)
    assert synthetic_tissue(4, layers=7, genes=2).shape == (4, 2)
