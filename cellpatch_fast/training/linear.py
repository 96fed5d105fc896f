"""Fit the linear path of an annotator: multinomial logistic regression, exactly, by scikit-learn.

Two models of the same cells (`model.linear` says what they look at):

- ``values``: on 50 unscaled components of (v - μ) · w;
- ``seen``: on all genes of (M - μ) · w. With fewer cells than genes that is a regression on the
  cells' Gram matrix, of the same coefficients: cells² numbers instead of cells x genes. Beyond
  `GRAM_CELLS` it is fitted on the sparse matrix itself, with the C that a sample has chosen.

C, and for ``seen`` the exponent e of w = σ^(-e), are chosen by the log-likelihood of cells left out
in `FOLDS`-fold cross-validation within the cells that are given. All coefficients are mapped back
to genes, so that the result is a table.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.sparse import csr_array

from ..model.linear import LinearPath
from .expression import Components, components, gene_weights, seen

logger = logging.getLogger("cellpatch_fast")

COMPONENTS = 50
VALUES_C = (0.001, 0.01, 0.1, 1.0)  # inverse penalties that are tried
SEEN_C = (10.0, 100.0, 1000.0)
EXPONENTS = (
    0.5,
    1.0,
)  # 1, variance 1 for every gene, is better for sorted blood cells (0.02 of F1)
FOLDS = 3
GRAM_CELLS = 5_000  # whose Gram matrix is 200 MB
ITERATIONS = 500
TOLERANCE = 1e-4  # largest gradient, where the iteration ends: scikit-learn's default
ABSENT = -1e4  # logit of a class without cells: its probability is 0, and float16 holds it
LEAST_PROBABILITY = 1e-9  # of a class that a fold had no cell of


@dataclass(frozen=True, eq=False)
class Table:
    """A fitted linear model: logits are matrix @ weights + bias.

    Parameters
    ----------
    weights
        float64 [genes, classes].
    bias
        float64 [classes].
    penalty, exponent
        The C and the exponent that were chosen.
    """

    weights: np.ndarray
    bias: np.ndarray
    penalty: float
    exponent: float = EXPONENTS[0]

    def tempered(self, temperature: float) -> Table:
        """The same model, its logits divided by ``temperature``."""
        weights, bias = self.weights / temperature, self.bias / temperature
        return Table(weights, bias, self.penalty, self.exponent)


@dataclass(frozen=True, eq=False)
class LinearModels:
    """Both models of the linear path, of ``values`` and of what is ``seen``."""

    values: Table
    seen: Table

    def tempered(self, temperatures: Sequence[float]) -> LinearModels:
        """The same models, their logits divided by a temperature each."""
        of_values, of_seen = temperatures
        return LinearModels(self.values.tempered(of_values), self.seen.tempered(of_seen))

    def load_into(self, path: LinearPath, shares: np.ndarray) -> None:
        """Make them an annotator's."""
        path.values.copy_(torch.from_numpy(self.values.weights))
        path.seen.copy_(torch.from_numpy(self.seen.weights))
        path.bias.copy_(torch.from_numpy(np.stack([self.values.bias, self.seen.bias])))
        path.shares.copy_(torch.from_numpy(shares))


def fit(
    values: csr_array,
    codes: np.ndarray,
    classes: int,
    seed: int,
    penalties: tuple[float, float] | None = None,
    exponent: float = EXPONENTS[0],
) -> LinearModels:
    """Fit both models.

    Parameters
    ----------
    values
        Of cells [cells, gene tokens].
    codes
        int64 [cells]: their classes, below ``classes``; a class may be missing.
    seed
        Of folds, samples, and the iteration that finds components.
    penalties, exponent
        The C of each model, and the exponent of ``seen``; without penalties all are chosen.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    chosen = (None, None) if penalties is None else penalties
    # The iterations multiply small matrices thousands of times. Threads of BLAS spin while they
    # wait for each other: beside other busy processes that took most of a run. So each fit has one.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LinearModels(
            _fit_values(values, codes, classes, seed, chosen[0]),
            _fit_seen(values, codes, classes, seed, chosen[1], exponent),
        )


def _fit_values(
    values: csr_array, codes: np.ndarray, classes: int, seed: int, penalty: float | None
) -> Table:
    principal = components(csr_array(values, dtype=np.float64), COMPONENTS, seed)
    features = principal.scores(values)
    penalty = penalty or _best(features, codes, VALUES_C, seed)[0]
    coefficients, intercept = _regress(features, codes, classes, penalty)
    return _mapped_back(principal, coefficients, intercept, penalty)


def _fit_seen(
    values: csr_array,
    codes: np.ndarray,
    classes: int,
    seed: int,
    penalty: float | None,
    exponent: float,
) -> Table:
    matrix, scale = seen(values)
    some = np.arange(len(codes))
    if len(some) > GRAM_CELLS:
        some = np.sort(np.random.default_rng(seed).choice(some, GRAM_CELLS, replace=False))
    if penalty is None:
        tried = []
        for each in EXPONENTS:
            features, _, _ = _gram_features(matrix, some, each)
            tried.append((*_best(features, codes[some], SEEN_C, seed), each))
        penalty, _, exponent = max(tried, key=lambda trial: trial[1])
    features, directions, size = _gram_features(matrix, some, exponent)
    mean, weights = gene_weights(matrix, exponent)
    weighted = csr_array(matrix * weights)  # w on every column
    if len(some) == len(codes):
        coefficients, intercept = _regress(features, codes, classes, penalty)
        by_cell = directions @ coefficients.T  # [cells, classes]
        rows = np.asarray(weighted.T @ by_cell) - (mean * weights)[:, None] * by_cell.sum(0)
        bias = intercept - (mean * weights) @ rows
    else:
        coefficients, bias = _regress(weighted / size, codes, classes, penalty)
        rows = coefficients.T / size
    return Table(scale * weights[:, None] * rows, bias, penalty, exponent)


def _gram_features(
    matrix: csr_array, some: np.ndarray, exponent: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coordinates of cells on the axes of their own Gram matrix, and the way back.

    Parameters
    ----------
    matrix
        Of all cells [cells, genes], whose mean and weights are used.
    some
        int64: the cells that are wanted.
    exponent
        Of the weights.

    Returns
    -------
    features
        float64 [some, rank]: products of them are those of the centred cells, over size².
    directions
        float64 [some, rank]: features = centred @ centred.T @ directions.
    size
        Root mean square norm of a centred cell.
    """
    mean, weights = gene_weights(matrix, exponent)
    weighted, centre = csr_array(matrix[some] * weights), mean * weights
    along = np.asarray(weighted @ centre)
    gram = (weighted @ weighted.T).toarray() - along[:, None] - along + centre @ centre
    variances, axes = np.linalg.eigh(gram)
    kept = variances > 1e-7 * max(variances[-1], 1e-30)
    variances, axes = variances[kept], axes[:, kept]
    size = float(np.sqrt(variances.sum() / len(gram))) or 1.0
    return axes * (np.sqrt(variances) / size), axes / (np.sqrt(variances) * size), size


def _mapped_back(
    principal: Components, coefficients: np.ndarray, intercept: np.ndarray, penalty: float
) -> Table:
    weights = principal.loadings @ coefficients.T
    return Table(weights, intercept - principal.mean @ weights, penalty)


def _best(
    features: np.ndarray, codes: np.ndarray, penalties: Sequence[float], seed: int
) -> tuple[float, float]:
    """The C with the highest log-likelihood of cells left out, and that."""
    from sklearn.model_selection import StratifiedKFold

    if np.bincount(codes).max() < FOLDS:
        return penalties[len(penalties) // 2], 0.0
    scores = np.zeros(len(penalties))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classes = int(codes.max()) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer cells than there are folds
        divided = list(folds.split(features, codes))

    def score(fold: tuple[np.ndarray, np.ndarray], penalty: float) -> float:
        fitted, left_out = fold
        coefficients, intercept = _regress(features[fitted], codes[fitted], classes, penalty)
        logits = features[left_out] @ coefficients.T + intercept
        true = softmax(logits)[np.arange(len(left_out)), codes[left_out]]
        return float(np.log(true.clip(LEAST_PROBABILITY)).sum())

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for fold in divided:
            scores += list(pool.map(partial(score, fold), penalties))
    return penalties[int(scores.argmax())], float(scores.max())


def _regress(
    features: np.ndarray | csr_array, codes: np.ndarray, classes: int, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [classes, features] and intercepts [classes]; a missing class has `ABSENT`."""
    from sklearn.linear_model import LogisticRegression

    coefficients = np.zeros((classes, features.shape[1]))
    intercept = np.full(classes, ABSENT)
    present = np.unique(codes)
    if len(present) == 1:
        intercept[present] = 0.0
        return coefficients, intercept
    if not features.shape[1]:  # cells do not differ: how frequent classes are is all there is
        intercept[present] = np.log(np.bincount(codes)[present] / len(codes))
        return coefficients, intercept
    model = LogisticRegression(C=penalty, tol=TOLERANCE, max_iter=ITERATIONS)
    model.fit(features, codes)
    weights, bias = model.coef_, model.intercept_
    if len(present) == 2:  # one row, of the second class against the first
        weights, bias = (np.concatenate([-x / 2, x / 2]) for x in (weights, bias))
    coefficients[present], intercept[present] = weights, bias
    return coefficients, intercept


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [cells, classes]."""
    from scipy.special import softmax as of_logits

    probabilities: np.ndarray = of_logits(logits, axis=1)
    return probabilities
