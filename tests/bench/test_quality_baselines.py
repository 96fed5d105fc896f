"""The linear baselines are what they are called, and learn from training cells alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parents[2]
CELLS, GENES, TYPES = 90, 400, 3


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def cells() -> anndata.AnnData:
    """Counts of three types, each with 20 genes of its own."""
    rng = np.random.default_rng(0)
    codes = np.arange(CELLS) % TYPES
    rates = np.full((CELLS, GENES), 0.3)
    for code in range(TYPES):
        rates[codes == code, 20 * code : 20 * (code + 1)] = 3.0
    names = np.array(["B", "NK", "T"])[codes]
    return anndata.AnnData(
        rng.poisson(rates).astype(np.float32),
        obs=pd.DataFrame({"type": names}, map(str, range(CELLS))),
    )


def split_of(cells: anndata.AnnData) -> Any:
    from bench.quality_data import Dataset, Split

    return Split(Dataset("three types", cells, "type", counts=True), 0)


def test_gram_coordinates_give_the_logistic_regression_of_all_genes() -> None:
    from bench.quality_baselines import gram_coordinates

    rng = np.random.default_rng(1)
    known, others = rng.normal(1.0, 1.0, (60, 300)), rng.normal(1.0, 1.0, (25, 300))
    labels = np.arange(60) % 3
    known[np.arange(60), labels] += 4.0
    about_mean, others_about_mean = known - known.mean(axis=0), others - known.mean(axis=0)
    norm = np.sqrt(np.square(about_mean).sum(axis=1).mean())
    tight: dict[str, Any] = {"C": 30.0, "tol": 1e-8, "max_iter": 10_000}
    direct = LogisticRegression(**tight).fit(about_mean / norm, labels)
    coordinates, others_coordinates = gram_coordinates(known, others)
    assert coordinates.shape[1] < 60  # axes, not genes
    turned = LogisticRegression(**tight).fit(coordinates, labels)
    np.testing.assert_allclose(
        turned.predict_proba(others_coordinates),
        direct.predict_proba(others_about_mean / norm),
        atol=1e-4,
    )


def test_strength_is_chosen_by_likelihood_of_cells_held_out() -> None:
    from bench.quality_baselines import STRENGTHS, choose_strength

    rng = np.random.default_rng(2)
    labels = np.array(["B", "T"], object)[np.arange(120) % 2]
    noise = rng.normal(size=(120, 200)) / np.sqrt(200)
    assert choose_strength(noise, labels) == STRENGTHS[0]  # nothing to be learnt: stay near 0
    telling = noise.copy()
    telling[:, 0] = np.where(labels == "B", -1.0, 1.0)
    assert choose_strength(telling, labels) > STRENGTHS[1]


def test_strength_is_chosen_with_a_class_of_a_single_cell() -> None:
    from bench.quality_baselines import STRENGTHS, choose_strength

    rng = np.random.default_rng(3)
    labels = np.array(["B", "T"] * 15 + ["rare"], object)
    assert choose_strength(rng.normal(size=(31, 5)), labels) in STRENGTHS


@pytest.mark.parametrize("name", ["components", "all_genes", "scaled_genes"])
def test_baselines_tell_types_with_genes_of_their_own(name: str, cells: anndata.AnnData) -> None:
    from bench import quality_baselines

    split = split_of(cells)
    predicted = getattr(quality_baselines, name)(split)
    assert (predicted.labels == split.data.labels[~split.training]).all()


@pytest.mark.parametrize("name", ["components", "all_genes", "scaled_genes"])
def test_labels_of_test_cells_change_nothing(name: str, cells: anndata.AnnData) -> None:
    from bench import quality_baselines

    split = split_of(cells)
    before = getattr(quality_baselines, name)(split)
    _ = split.parts  # decided before labels change
    cells.obs.loc[~split.training, "type"] = "B"
    after = getattr(quality_baselines, name)(split)
    np.testing.assert_array_equal(after.labels, before.labels)
    assert after.strength == before.strength


def test_scores_are_limited_and_in_units_of_the_known_cells() -> None:
    from bench.quality_baselines import LARGEST_SCORE, standardised

    known = np.array([[0.0], [2.0]])
    scaled, others = standardised(known, np.array([[3.0], [1e6]]))
    np.testing.assert_allclose(scaled[:, 0], [-1, 1])
    np.testing.assert_allclose(others[:, 0], [2, LARGEST_SCORE])


def test_splits_hold_a_fifth_of_every_type(cells: anndata.AnnData) -> None:
    split = split_of(cells)
    assert (split.data.cells.obs["type"][~split.training].value_counts() == 6).all()
    proportions = np.expm1(split.data.log_normalised().X.toarray()).sum(axis=1)
    np.testing.assert_allclose(proportions, 1e4)
