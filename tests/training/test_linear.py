"""The linear path's models are scikit-learn's, on features that are written out here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from cellpatch_fast.training import linear
from cellpatch_fast.training.expression import seen
from cellpatch_fast.training.linear import EXPONENTS, SEEN_C, VALUES_C, Table, fit

PENALTIES = 0.1, 100.0


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads of small products wait for each other most of the time."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def _converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the iteration ends depends on the coordinates; its limit does not."""
    monkeypatch.setattr(linear, "TOLERANCE", 1e-9)


def cells_of(codes: np.ndarray, genes: int = 61, seed: int = 0, shift: float = 1.0) -> csr_array:
    """Cells whose class shifts some genes; gene 0 (padding) and gene 1 are in no cell."""
    random = np.random.default_rng([seed, genes])
    profiles = random.normal(0, shift, (codes.max() + 1, genes))
    found = (random.normal(0.3, 1.0, (len(codes), genes)) + profiles[codes]).clip(min=0)
    found[:, :2] = 0
    return csr_array(found.astype(np.float32))


def weights_of(dense: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    kept = ((dense > 0).sum(axis=0) >= 3) & (dense.std(axis=0) > 0)
    return np.where(kept, np.where(kept, dense.std(axis=0), 1) ** -exponent, 0)


def features_of_values(values: csr_array) -> np.ndarray:
    """50 components of the values, not scaled."""
    dense = values.toarray().astype(float)
    weighted = (dense - dense.mean(axis=0)) * weights_of(dense)
    kept = min(50, len(dense) - 1, np.count_nonzero(weights_of(dense)) - 1)
    left, singular_values, _ = np.linalg.svd(weighted, full_matrices=False)
    return left[:, :kept] * singular_values[:kept]


def features_of_seen(values: csr_array, exponent: float = 0.5) -> np.ndarray:
    """(M - μ) · w, over the root mean square norm of a cell."""
    dense = seen(values)[0].toarray()
    weighted = (dense - dense.mean(axis=0)) * weights_of(dense, exponent)
    return weighted / np.sqrt(np.square(weighted).sum() / len(weighted))


def regressed(features: np.ndarray, codes: np.ndarray, penalty: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression = LogisticRegression(C=penalty, tol=linear.TOLERANCE, max_iter=500)
        return regression.fit(features, codes)


def seen_by_tables(values: csr_array) -> np.ndarray:
    """What the table of ``seen`` is for: softmaxes, without a scale."""
    found, scale = seen(values)
    return found.toarray() / scale


def logits(table: Table, matrix: np.ndarray) -> np.ndarray:
    return matrix @ table.weights + table.bias


def compare(table: Table, matrix: np.ndarray, features: np.ndarray, codes: np.ndarray) -> None:
    """Log-probabilities are scikit-learn's; logits are, up to what all classes have."""
    model = regressed(features, codes, table.penalty)
    found, expected = logits(table, matrix), model.predict_log_proba(features)
    present = np.unique(codes)
    assert np.abs(log_softmax(found, axis=1)[:, present] - expected).max() < 1e-4
    others = np.setdiff1d(np.arange(found.shape[1]), present)
    assert (np.exp(log_softmax(found, axis=1)[:, others]) == 0).all()


@pytest.mark.usefixtures("_converged")
@pytest.mark.parametrize(
    ("counts", "classes"),
    [
        pytest.param([31, 43], 2, id="two classes"),
        pytest.param([29, 17, 23, 11, 37], 5, id="five"),
        pytest.param([19, 0, 31, 0, 23], 5, id="two are missing"),
        pytest.param([19, 31, 23], 7, id="the last are missing"),
        pytest.param([41, 1, 2, 3], 4, id="of one to three cells"),
        pytest.param([3] * 53, 53, id="more classes than components"),
        pytest.param([1, 1, 2], 3, id="four cells"),
    ],
)
def test_models_are_scikit_learns_on_dense_features(counts: list[int], classes: int) -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    values = cells_of(codes)
    models = fit(values, codes, classes, seed=0, penalties=PENALTIES)
    assert models.values.weights.shape == models.seen.weights.shape == (61, classes)
    assert (models.values.penalty, models.seen.penalty) == PENALTIES
    compare(models.values, values.toarray(), features_of_values(values), codes)
    compare(models.seen, seen_by_tables(values), features_of_seen(values), codes)


@pytest.mark.usefixtures("_converged")
def test_more_cells_than_genes() -> None:
    """The Gram matrix then has no more axes than there are genes."""
    codes = np.random.default_rng(0).integers(0, 3, 173)
    values = cells_of(codes, genes=13)
    models = fit(values, codes, 3, seed=0, penalties=PENALTIES)
    compare(models.values, values.toarray(), features_of_values(values), codes)
    compare(models.seen, seen_by_tables(values), features_of_seen(values), codes)


@pytest.mark.usefixtures("_converged")
@pytest.mark.parametrize("classes", [2, 4])
def test_beyond_the_gram_matrix_the_model_is_that_of_the_sparse_matrix(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    """It is not centred there, which the intercept makes up for; C is chosen by a sample."""
    codes = np.random.default_rng(0).integers(0, classes, 131)
    values = cells_of(codes)
    whole = fit(values, codes, classes, seed=0, penalties=PENALTIES).seen
    monkeypatch.setattr(linear, "GRAM_CELLS", 127)
    table = fit(values, codes, classes, seed=0, penalties=PENALTIES).seen
    some = np.sort(np.random.default_rng(0).choice(131, 127, replace=False))
    dense = seen(values)[0].toarray()
    weighted = dense * weights_of(dense)
    sample = weighted[some] - weighted.mean(axis=0)
    size = np.sqrt(np.square(sample).sum() / 127)
    compare(table, seen_by_tables(values), weighted / size, codes)
    # the same objective, but for the size of 127 cells: nearly the same model
    found, expected = (logits(x, seen_by_tables(values)) for x in (table, whole))
    assert np.abs(log_softmax(found, 1) - log_softmax(expected, 1)).max() < 0.3
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.95


def test_genes_that_no_training_cell_has_weigh_nothing() -> None:
    """Nor those of fewer than three; so a gene of new cells alone changes nothing."""
    codes = np.repeat([0, 1, 2], 13)
    dense = cells_of(codes).toarray()
    dense[:, 7] = 0
    dense[:, 8] = np.where(np.arange(39) < 2, dense[:, 8] + 1, 0)
    models = fit(csr_array(dense), codes, 3, seed=0, penalties=PENALTIES)
    for table in (models.values, models.seen):
        absent = ~table.weights.any(axis=1)
        assert np.flatnonzero(absent).tolist() == [0, 1, 7, 8]


@pytest.mark.parametrize("cells", ["alike", "empty", "two"])
def test_cells_without_differences_leave_how_frequent_classes_are(cells: str) -> None:
    """Of two cells no gene is in three."""
    codes = np.array([0, 2]) if cells == "two" else np.array([0, 2, 2, 2, 0, 2])
    dense = np.tile(np.arange(7.0), (len(codes), 1)) * (cells != "empty")
    if cells == "two":
        dense[1] *= 2
    models = fit(csr_array(dense.astype(np.float32)), codes, 3, seed=0)
    frequent = np.bincount(codes, minlength=3) / len(codes)
    for table in (models.values, models.seen):
        assert not table.weights.any()
        found = np.exp(log_softmax(table.bias))
        assert found == pytest.approx(frequent, abs=1e-4)


def test_one_class_is_certain() -> None:
    codes = np.full(11, 1)
    models = fit(cells_of(codes), codes, 3, seed=0)
    for table in (models.values, models.seen):
        assert not table.weights.any()
        assert np.exp(log_softmax(table.bias)).tolist() == [0, 1, 0]


def best_of(
    features: np.ndarray, codes: np.ndarray, penalties: tuple[float, ...], seed: int
) -> tuple[float, np.ndarray]:
    """The C with the highest log-likelihood of cells left out, and all of them."""
    scores = np.zeros(len(penalties))
    for fitted, left_out in StratifiedKFold(3, shuffle=True, random_state=seed).split(
        features, codes
    ):
        for place, penalty in enumerate(penalties):
            model = regressed(features[fitted], codes[fitted], penalty)
            found = model.predict_log_proba(features[left_out])
            scores[place] += found[np.arange(len(left_out)), codes[left_out]].sum()
    return penalties[int(scores.argmax())], scores


@pytest.mark.parametrize("seed", [0, 5])
def test_penalties_are_chosen_by_cells_left_out_of_those_given(seed: int) -> None:
    """Little where classes differ clearly, much where they do not."""
    chosen = []
    for shift in (0.0, 0.3, 2.0):
        codes = np.random.default_rng(seed).integers(0, 3, 83)
        values = cells_of(codes, seed=seed, shift=shift)
        models = fit(values, codes, 3, seed)
        exponent = models.seen.exponent
        tried: list[tuple[Table, np.ndarray, Any]] = [
            (models.values, features_of_values(values), VALUES_C),
            (models.seen, features_of_seen(values, exponent), SEEN_C),
        ]
        highest = [
            best_of(features_of_seen(values, each), codes, SEEN_C, seed)[1].max()
            for each in EXPONENTS
        ]
        # to 0.01 over all cells: where both fit perfectly, either may be chosen
        assert highest[EXPONENTS.index(exponent)] >= max(highest) - 0.01
        for table, features, penalties in tried:
            expected, scores = best_of(features, codes, penalties, seed)
            second, first = np.sort(scores)[-2:]
            assert first - second > 1e-3  # the choice is clear
            assert table.penalty == expected
        chosen.append((models.values.penalty, models.seen.penalty))
    assert chosen[0] == (VALUES_C[0], SEEN_C[0])
    assert chosen[2][0] > chosen[0][0]
    assert chosen[2][1] > chosen[0][1]


@pytest.mark.parametrize("counts", [[2, 2, 1], [2, 40], [1, 1, 1, 5]])
def test_penalties_are_chosen_where_classes_are_smaller_than_the_folds(counts: list[int]) -> None:
    codes = np.repeat(np.arange(len(counts)), counts)
    models = fit(cells_of(codes), codes, len(counts), seed=0)
    assert models.values.penalty in VALUES_C
    assert models.seen.penalty in SEEN_C
    if max(counts) < 3:  # there is nothing to choose by
        assert (models.values.penalty, models.seen.penalty) == (VALUES_C[2], SEEN_C[1])


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=5), st.integers(0, 99))
def test_any_cells_give_finite_models(counts: list[int], seed: int) -> None:
    """That a saved annotator can hold, of which every class is there or not."""
    codes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    models = fit(cells_of(codes, genes=23, seed=seed), codes, len(counts) + 2, seed=seed)
    for table in (models.values, models.seen):
        assert np.isfinite(table.weights).all()
        assert np.isfinite(table.bias).all()
        assert np.abs(table.bias).max() < np.finfo(np.float16).max
