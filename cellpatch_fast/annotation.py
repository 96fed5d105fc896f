"""From probabilities of classes to labels: what `tl.annotate` and `atlas.annotate` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .gene_names import first_names
from .training.evaluation import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd


def require_threshold(threshold: float, classes: Sequence[str]) -> None:
    """Refuse what is no probability, and a class that is called as what is below it."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is a probability, from 0 to 1; found {threshold}")
    if threshold and UNKNOWN in classes:
        raise InputError(
            f"the model has a class {UNKNOWN!r}, so cells below a threshold could not be told from "
            "its cells: use no threshold"
        )


def require_overlap(truth: np.ndarray, classes: Sequence[str]) -> None:
    """Refuse true labels, object [cells], none of which the model can tell."""
    found = list(dict.fromkeys(str(name) for name in truth if name is not None))
    if not set(found) & set(classes):
        raise InputError(
            f"no true label is among the model's classes: the labels are "
            f"{first_names(found) or 'missing'}, the classes {first_names(list(classes))}. Is this "
            "the right column, and the right model?"
        )


def most_likely(probabilities: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The most likely class of each cell, and how likely it is.

    Parameters
    ----------
    probabilities
        [cells, classes].
    threshold
        Below it a cell's class is unknown.

    Returns
    -------
    codes
        int64 [cells]; the number of classes stands for unknown.
    highest
        float32 [cells].
    """
    codes = probabilities.argmax(axis=1)
    highest = probabilities.max(axis=1).astype(np.float32)
    return np.where(highest < threshold, probabilities.shape[1], codes), highest


def label_column(codes: np.ndarray, classes: Sequence[str]) -> pd.Categorical:
    """Labels [cells] from `most_likely`'s codes; "unknown" is a category where it occurs."""
    import pandas as pd

    unknown = [UNKNOWN] if (codes == len(classes)).any() else []
    return pd.Categorical.from_codes(codes, categories=[*classes, *unknown])
