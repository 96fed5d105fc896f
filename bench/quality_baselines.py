"""Logistic regression, the baseline that foundation models are measured against.

Everything is fitted on training cells: genes, means, scales, components and the strength of the
penalty, which three-fold cross-validation within the training cells chooses by log-likelihood.

With fewer cells than genes, logistic regression with an L2 penalty needs no genes: the weights of
a class are a combination of the training cells, so that coordinates of the cells, from the
eigenvectors of their Gram matrix, give the same model at a fraction of the cost.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from bench.quality_data import Split

COMPONENTS, VARIABLE_GENES = 50, 2000
LARGEST_SCORE = 10.0  # of a scaled gene, as in scanpy's tutorials
FEWEST_CELLS = 3  # that a scaled gene is found in
FOLDS = 3
STRENGTHS = tuple(10.0**power for power in range(6))  # C, of cells with a squared norm of 1
LEAST_VARIANCE = 1e-10  # of the largest: what varies less is rounding
MAX_ITERATIONS = 2000


@dataclass(frozen=True, eq=False)
class Predicted:
    """What logistic regression says of the test cells.

    Attributes
    ----------
    labels
        object [test cells]
    strength
        The C that was chosen; None where there was no choice.
    """

    labels: np.ndarray
    strength: float | None = None


def components(split: Split) -> Predicted:
    """The usual way: variable genes, scaling, principal components."""
    import scanpy

    cells, training, labels = split.data.log_normalised(), split.training, split.data.labels
    if cells.n_vars > VARIABLE_GENES:
        seen = cells[training].copy()
        scanpy.pp.highly_variable_genes(seen, n_top_genes=VARIABLE_GENES)
        cells = cells[:, seen.var["highly_variable"].to_numpy()]
    x = cells.X.toarray()
    model = make_pipeline(
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": None, "a_max": LARGEST_SCORE}),
        PCA(COMPONENTS, random_state=0),
        LogisticRegression(max_iter=MAX_ITERATIONS),
    ).fit(x[training], labels[training])
    return Predicted(model.predict(x[~training]))


def all_genes(split: Split) -> Predicted:
    """Log-normalised values of all genes, each about its mean."""
    x, training = split.data.log_normalised().X, split.training
    expressed = x[training].getnnz(axis=0) > 0  # others have no weight
    return regress(x[training][:, expressed].toarray(), x[~training][:, expressed].toarray(), split)


def scaled_genes(split: Split) -> Predicted:
    """The same, of genes scaled to variance 1, so that rare ones count as much as others."""
    x, training = split.data.log_normalised().X, split.training
    expressed = x[training].getnnz(axis=0) >= FEWEST_CELLS
    training_values, others = (
        x[training][:, expressed].toarray(),
        x[~training][:, expressed].toarray(),
    )
    return regress(*standardised(training_values, others), split)


def regress(training_values: np.ndarray, others: np.ndarray, split: Split) -> Predicted:
    """Logistic regression with the strength that cross-validation chooses.

    Parameters
    ----------
    known, others
        Training and test cells, float64 [cells, features].
    split
        Whose labels are learned.
    """
    labels = split.data.labels[split.training]
    training_values, others = gram_coordinates(training_values, others)
    strength = choose_strength(training_values, labels)
    model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(training_values, labels)
    return Predicted(model.predict(others), strength)


def standardised(training_values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in standard deviations from the mean of the known ones, `LARGEST_SCORE` at most."""
    scaler = StandardScaler().fit(training_values)
    limits = -LARGEST_SCORE, LARGEST_SCORE
    return scaler.transform(training_values).clip(*limits), scaler.transform(others).clip(*limits)


def gram_coordinates(
    training_values: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cells about the mean of the known ones, turned to the axes that the known ones span.

    Turning changes neither the predictions nor the penalty of a linear model that is learnt from
    the known cells. Both are divided by the known cells' root mean square norm, so that the same
    strengths of the penalty are a choice for any data.

    Parameters
    ----------
    known, others
        float64 [cells, features]

    Returns
    -------
    tuple
        float64 [cells, axes], of the known and of the other cells; axes ≤ known cells.
    """
    mean = training_values.mean(axis=0)
    training_values, others = training_values - mean, others - mean
    variances, directions = np.linalg.eigh(
        training_values @ training_values.T
    )  # of the Gram matrix
    kept = variances > LEAST_VARIANCE * variances[-1]
    lengths, directions = np.sqrt(variances[kept]), directions[:, kept]
    norm = np.sqrt(np.square(lengths).sum() / len(training_values))
    return directions * (lengths / norm), others @ training_values.T @ directions / (lengths * norm)


def choose_strength(features: np.ndarray, labels: np.ndarray) -> float:
    """Of `STRENGTHS`, that under which cells held out, fold by fold, are most likely.

    A cell whose class is missing from the other folds says nothing of the strength and is passed
    over. Cells were centred and scaled together with those held out: training cells all.
    """
    likelihood = np.zeros(len(STRENGTHS))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it is passed over
        parts = list(folds.split(features, labels))
    for rest, held in parts:
        held = held[np.isin(labels[held], labels[rest])]
        # ascending: each fit begins where the one before ended
        model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
        for i, strength in enumerate(STRENGTHS):
            model.set_params(C=strength).fit(features[rest], labels[rest])
            truth = np.searchsorted(model.classes_, labels[held])
            told = model.predict_log_proba(features[held])
            likelihood[i] += told[np.arange(len(held)), truth].sum()
    return STRENGTHS[int(likelihood.argmax())]
