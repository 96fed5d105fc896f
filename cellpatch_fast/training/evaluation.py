"""How good an annotation is: predicted cell types against true ones, in numbers and a figure.

All numbers come from scikit-learn. Three conventions are ours, and stated with every result:

- A cell that the model left "unknown" counts as wrong; the share of such cells is reported.
- A cell whose true label the model has never seen cannot be right. It is left out of every number,
  and counted.
- The macro F1 is the mean over the classes that occur in the truth. Averaging over predicted
  classes too, as scikit-learn does when it is not told which, would count "unknown" as a class and
  give every model with many classes a lower number on data with few.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..figures import require_matplotlib
from ..files import write_whole
from ..gene_names import first_names

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

UNKNOWN = "unknown"  # the prediction for a cell below the threshold of probability


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found. ``str()`` gives it in a line or two.

    Attributes
    ----------
    classes
        The classes that occur in the truth or among the predictions, in the model's order.
    cells
        How many cells the numbers are of.
    accuracy
        The share of cells whose prediction is right.
    macro_f1
        The mean F1 of the classes that occur in the truth:
        ``sklearn.metrics.f1_score(average="macro", zero_division=0, labels=those classes)``.
    adjusted_rand_index
        Agreement of the two groupings of cells: 0 by chance, 1 at best; "unknown" is a group.
    unknown_share
        The share of cells predicted "unknown".
    left_out
        How many further cells have a label that is not among the model's classes, or none.
    log_loss
        Mean of -log(probability of the true class), in nats; None without probabilities.
    per_class : pandas.DataFrame
        Index "class" (as ``classes``); columns precision, recall, f1 and cells (true ones). A
        precision or recall of no cells is 0.
    confusion : pandas.DataFrame
        Counts of cells, int64: truth (rows, as ``classes``) x predicted (columns, as ``classes``,
        then "unknown" if it occurs).
    """

    classes: tuple[str, ...]
    cells: int
    accuracy: float
    macro_f1: float
    adjusted_rand_index: float
    unknown_share: float
    left_out: int
    log_loss: float | None
    per_class: pd.DataFrame
    confusion: pd.DataFrame

    def __str__(self) -> str:
        types = (self.per_class["cells"] > 0).sum()
        text = (
            f"accuracy {self.accuracy:.3f}, macro F1 {self.macro_f1:.3f}, adjusted Rand index "
            f"{self.adjusted_rand_index:.3f} on {self.cells:,} cells of {types} classes"
        )
        notes = []
        if self.unknown_share:
            notes.append(f"{self.unknown_share:.1%} of them left unknown, which counts as wrong")
        if self.left_out:
            notes.append(f"{self.left_out:,} more left out: not among the model's classes")
        return text + ("\n" + "; ".join(notes) if notes else "")

    def metrics(self) -> dict[str, Any]:
        """Every number but the tables, ready for JSON."""
        return {
            "cells": self.cells,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "adjusted_rand_index": self.adjusted_rand_index,
            "log_loss": self.log_loss,
            "unknown_share": self.unknown_share,
            "left_out": self.left_out,
            "classes": list(self.classes),
        }

    def save(self, folder: str | Path, figures: bool = True) -> None:
        """Write ``metrics.json``, ``per_class.csv`` and ``confusion.csv`` to a folder.

        And the confusion matrix as ``confusion.png`` and ``confusion.svg``. Each file is written
        whole or not at all; those of an earlier evaluation are replaced.

        Parameters
        ----------
        folder
            Made if it does not exist.
        figures
            Draw the figures, which needs the extra ``analysis``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metrics.json", json.dumps(self.metrics(), indent=2) + "\n")
        write_whole(folder / "per_class.csv", self.per_class.to_csv())
        write_whole(folder / "confusion.csv", self.confusion.to_csv())
        if figures:
            from .. import pl

            pl.confusion_matrix(self, save=folder / "confusion")


def evaluate(
    truth: ArrayLike,
    predicted: ArrayLike,
    classes: Sequence[str],
    *,
    probabilities: ArrayLike | None = None,
) -> Evaluation:
    """Compare predicted cell types with true ones.

    Parameters
    ----------
    truth
        The true label of each cell [c], str; one that is missing (None, NaN) is left out.
    predicted
        The predicted class of each cell [c], str: one of ``classes``, or "unknown".
    classes
        The model's classes, in its order.
    probabilities
        Of each cell and class [c, classes], float, rows that sum to 1: for the log loss.

    Raises
    ------
    InputError
        If lengths or classes do not fit together, no true label is among ``classes``, or the extra
        ``analysis`` is not installed.

    Examples
    --------
    >>> truth, predicted = ["B", "T", "T", "NK"], ["B", "T", "B", "T"]
    >>> print(evaluate(truth, predicted, ["B", "T"]))
    accuracy 0.667, macro F1 0.667, adjusted Rand index 0.000 on 3 cells of 2 classes
    1 more left out: not among the model's classes
    """
    import pandas as pd

    metrics = _import_metrics()
    names = _checked_classes(classes)
    true_labels, guesses = _labels(truth), _labels(predicted)
    if len(true_labels) != len(guesses):
        raise InputError(f"there are {len(true_labels):,} true labels, {len(guesses):,} predicted")
    true_codes = pd.Index(names).get_indexer(true_labels)  # [c], -1 for a label that is not there
    guess_codes = pd.Index([*names, UNKNOWN]).get_indexer(guesses)  # [c]
    if (guess_codes < 0).any():
        strange = [str(name) for name in guesses[guess_codes < 0].unique()]
        raise InputError(
            f"predictions hold {first_names(strange)}, neither one of the classes "
            f"({first_names(names)}) nor {UNKNOWN!r}"
        )
    kept = true_codes >= 0
    if not kept.any():
        found = [str(name) for name in true_labels.dropna().unique()]
        raise InputError(
            f"no true label is among the model's classes: the labels are {first_names(found)} and "
            f"the classes {first_names(names)}. Is this the right column, and the right model?"
        )
    loss = None
    if probabilities is not None:
        rows = _checked_probabilities(probabilities, (len(kept), len(names)))[kept]
        loss = float(metrics.log_loss(true_codes[kept], rows, labels=range(len(names))))
    true_codes, guess_codes = true_codes[kept], guess_codes[kept]
    present = np.unique([*true_codes, *guess_codes[guess_codes < len(names)]])
    in_truth = np.unique(true_codes)
    scores = {"zero_division": 0, "labels": in_truth, "average": "macro"}
    return Evaluation(
        classes=tuple(names[code] for code in present),
        cells=len(true_codes),
        accuracy=float(metrics.accuracy_score(true_codes, guess_codes)),
        macro_f1=float(metrics.f1_score(true_codes, guess_codes, **scores)),
        adjusted_rand_index=float(metrics.adjusted_rand_score(true_codes, guess_codes)),
        unknown_share=float((guess_codes == len(names)).mean()),
        left_out=int((~kept).sum()),
        log_loss=loss,
        per_class=_per_class(true_codes, guess_codes, present, names),
        confusion=_confusion(true_codes, guess_codes, present, names),
    )


def require_analysis() -> None:
    """Refuse to begin what could not be evaluated, or drawn, in the end.

    Raises
    ------
    InputError
        If the extra ``analysis`` is not installed.
    """
    _import_metrics()
    require_matplotlib()


def _labels(values: ArrayLike) -> pd.Series[Any]:
    """Labels as str, so that 3 and "3" are the same; missing ones stay missing."""
    import pandas as pd

    labels = pd.Series(values, dtype=object)
    return labels.where(labels.isna(), labels.astype(str))


def _per_class(
    truth: np.ndarray, predicted: np.ndarray, present: np.ndarray, names: list[str]
) -> pd.DataFrame:
    import pandas as pd

    columns = _import_metrics().precision_recall_fscore_support(
        truth, predicted, labels=present, zero_division=0
    )
    index = pd.Index([names[code] for code in present], name="class")
    table = dict(zip(("precision", "recall", "f1", "cells"), columns, strict=True))
    return pd.DataFrame(table, index=index)


def _confusion(
    truth: np.ndarray, predicted: np.ndarray, present: np.ndarray, names: list[str]
) -> pd.DataFrame:
    import pandas as pd

    labels = [*present, len(names)]  # "unknown" comes last
    counts = _import_metrics().confusion_matrix(truth, predicted, labels=labels)  # [truth, guess]
    named = [names[code] for code in present]
    table = pd.DataFrame(
        counts[:-1],  # no cell is truly "unknown"
        index=pd.Index(named, name="truth"),
        columns=pd.Index([*named, UNKNOWN], name="predicted"),
    )
    return table if table[UNKNOWN].any() else table.drop(columns=UNKNOWN)


def _checked_classes(classes: Sequence[str]) -> list[str]:
    names = [str(name) for name in classes]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InputError(f"classes hold {first_names(repeated)} more than once")
    if UNKNOWN in names:
        raise InputError(
            f"{UNKNOWN!r} is one of the classes, but stands for cells below the threshold: leave "
            "these cells out of the training, or give the class another name"
        )
    return names


def _checked_probabilities(probabilities: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
    rows = np.asarray(probabilities, np.float64)  # [c, classes]
    if rows.shape != shape:
        raise InputError(f"probabilities are {rows.shape}, expected [cells, classes] = {shape}")
    sums = rows.sum(axis=1, keepdims=True)
    if not (rows >= 0).all() or not np.allclose(sums, 1, atol=0.01):  # bfloat16 has 2 decimals
        raise InputError("probabilities must be numbers from 0 to 1 that sum to 1 for each cell")
    return rows / sums


def _import_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise InputError(
            "an evaluation needs scikit-learn: pip install 'cellpatch-fast[analysis]'"
        ) from error
    return metrics
