"""How good an annotation is: predicted cell types against true ones, in numbers and tables.

All scores come from scikit-learn. Three conventions are ours, and stated with every result:

- A cell that the model left "unknown" counts as wrong; the share of such cells is reported.
- A cell whose true label is not among the model's classes (another name, or a type that the model
  has never seen) cannot be right. Accuracy and macro F1 leave it out, and say how many cells they
  are of; the *overall* numbers are of every labelled cell and count it as wrong, also where it was
  left "unknown". The table truth x predicted has a row for every label.
- The macro F1 is the mean over the classes that occur in the truth. Averaging over predicted
  classes too, as scikit-learn does when it is not told which, would count "unknown" as a class and
  give every model with many classes a lower number on data with few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import write_whole
from ..genes.names import first_names
from ..plots.figures import require_matplotlib

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

UNKNOWN = "unknown"  # the prediction for a cell below the threshold of probability


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found. ``str()`` gives it in a few lines.

    A number of no cells is NaN.

    Attributes
    ----------
    classes
        The classes that occur in the truth or among the predictions, in the model's order.
    other_labels
        True labels that are not among the model's classes, the most frequent first.
    labelled_cells
        How many cells have a label.
    cells
        How many of these have one of the model's classes as label.
    unlabelled_cells
        How many cells have no label. They take part in nothing.
    accuracy
        The share of ``cells`` whose prediction is right.
    macro_f1
        Of ``cells``, the mean F1 of the classes that occur in the truth:
        ``sklearn.metrics.f1_score(average="macro", zero_division=0, labels=those classes)``.
    unknown_share
        The share of ``cells`` predicted "unknown".
    log_loss
        Of ``cells``, the mean of -log(probability of the true class), in nats; None without
        probabilities.
    overall_accuracy
        The share of ``labelled_cells`` whose prediction is their label.
    adjusted_rand_index
        Agreement of the two groupings of ``labelled_cells``, whatever the groups are called: 0 by
        chance, 1 at best; "unknown" is a group.
    per_class : pandas.DataFrame
        Index "class" (as ``classes``); columns precision, recall, f1 and cells (true ones), all of
        ``cells``, and overall_precision, the precision among ``labelled_cells``: of those
        predicted as the class, the share whose label it is. A share of no cells is 0.
    confusion : pandas.DataFrame
        Counts of cells, int64: truth (rows, as ``classes``, then ``other_labels``) x predicted
        (columns, as ``classes``, then "unknown" if it occurs). They sum to ``labelled_cells``.
    """

    classes: tuple[str, ...]
    other_labels: tuple[str, ...]
    labelled_cells: int
    cells: int
    unlabelled_cells: int
    accuracy: float
    macro_f1: float
    unknown_share: float
    log_loss: float | None
    overall_accuracy: float
    adjusted_rand_index: float
    per_class: pd.DataFrame
    confusion: pd.DataFrame

    def __str__(self) -> str:
        grouping = f"adjusted Rand index {self.adjusted_rand_index:z.3f}"
        types = f"of {(self.per_class['cells'] > 0).sum()} classes"
        if not self.labelled_cells:
            lines = ["no cell has a label: there is nothing to compare with"]
        elif not self.other_labels:
            lines = [f"{self.scores}, {grouping} on {self.cells:,} cells {types}"]
        else:
            overall = f"overall accuracy {self.overall_accuracy:.3f}, {grouping} on all "
            first = f"{self.scores}, {types}" if self.cells else self.scores
            lines = [first, f"{overall}{self.labelled_cells:,} labelled cells"]
        if notes := self._notes():
            lines.append("; ".join(notes))
        return "\n".join(lines)

    @property
    def scores(self) -> str:
        """Accuracy and macro F1 in words, and what share of the labelled cells they are of."""
        if not self.cells:
            return "no label is among the model's classes: no accuracy, no macro F1"
        text = f"accuracy {self.accuracy:.3f}, macro F1 {self.macro_f1:.3f}"
        if not self.other_labels:
            return text
        share = self.cells / self.labelled_cells
        return f"{text} on {self.cells:,} of {self.labelled_cells:,} labelled cells ({share:.1%})"

    @property
    def headline(self) -> str:
        """What stands above a figure of the table truth x predicted."""
        if not self.other_labels:
            return self.scores
        return (
            f"{self.scores}\noverall accuracy {self.overall_accuracy:.3f}; below the line: labels "
            "that are not among the model's classes"
        )

    def _notes(self) -> list[str]:
        notes = []
        if self.cells and self.unknown_share:
            among = f"of the {self.cells:,}" if self.other_labels else "of them"
            notes.append(f"{self.unknown_share:.1%} {among} left unknown, which counts as wrong")
        if self.other_labels:
            others = self.labelled_cells - self.cells
            notes.append(
                f"{others:,} with a label that is not among the model's classes "
                f"({first_names(list(self.other_labels))}), which counts as wrong overall"
            )
        if self.unlabelled_cells:
            notes.append(f"{self.unlabelled_cells:,} more without a label")
        return notes

    def metrics(self) -> dict[str, Any]:
        """Every number but the tables, ready for JSON: one of no cells is None."""
        numbers = {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "unknown_share": self.unknown_share,
            "log_loss": self.log_loss,
            "overall_accuracy": self.overall_accuracy,
            "adjusted_rand_index": self.adjusted_rand_index,
        }
        return {
            "labelled_cells": self.labelled_cells,
            "cells": self.cells,
            "unlabelled_cells": self.unlabelled_cells,
            **{n: None if x is None or math.isnan(x) else x for n, x in numbers.items()},
            "classes": list(self.classes),
            "other_labels": list(self.other_labels),
        }

    def save(self, folder: str | Path) -> None:
        """Write ``metrics.json``, ``per_class.csv`` and ``confusion.csv`` to a folder.

        Each file is written whole or not at all; those of an earlier evaluation are replaced.
        `cellpatch_fast.pl.confusion_matrix` draws the table truth x predicted.

        Parameters
        ----------
        folder
            Made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metrics.json", json.dumps(self.metrics(), indent=2) + "\n")
        write_whole(folder / "per_class.csv", self.per_class.to_csv())
        write_whole(folder / "confusion.csv", self.confusion.to_csv())


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
        If lengths or classes do not fit together, or the extra ``analysis`` is not installed.

    Examples
    --------
    >>> truth, predicted = ["B", "T", "T", "NK"], ["B", "T", "B", "T"]
    >>> print(evaluate(truth, predicted, ["B", "T"]))
    accuracy 0.667, macro F1 0.667 on 3 of 4 labelled cells (75.0%), of 2 classes
    overall accuracy 0.500, adjusted Rand index -0.286 on all 4 labelled cells
    1 with a label that is not among the model's classes ('NK'), which counts as wrong overall
    """
    import pandas as pd

    metrics = _import_metrics()
    names = _checked_classes(classes)
    labels, guesses = _labels(truth), _labels(predicted)
    if len(labels) != len(guesses):
        raise InputError(f"there are {len(labels):,} true labels, {len(guesses):,} predicted")
    in_model = labels.isin(names).to_numpy()  # [c]
    counts = labels[~in_model].value_counts(sort=False).sort_values(ascending=False, kind="stable")
    others = tuple(counts.index)
    loss = None
    if probabilities is not None:
        rows = _checked_probabilities(probabilities, (len(in_model), len(names)))[in_model]
        codes = pd.Index(names).get_indexer(labels[in_model])
        loss = float(metrics.log_loss(codes, rows, labels=range(len(names)))) if len(rows) else None
    labelled = labels.notna().to_numpy()
    true_codes = pd.Index([*names, *others]).get_indexer(labels[labelled])  # [labelled]
    guess_codes = _guess_codes(guesses, names)[labelled]
    in_model = in_model[labelled]
    compared = true_codes[in_model], guess_codes[in_model]
    present = np.union1d(compared[0], guess_codes[guess_codes >= 0])
    names_present = tuple(names[code] for code in present)
    macro: dict[str, Any] = {
        "zero_division": 0,
        "labels": np.unique(compared[0]),
        "average": "macro",
    }
    return Evaluation(
        classes=names_present,
        other_labels=others,
        labelled_cells=len(in_model),
        cells=int(in_model.sum()),
        unlabelled_cells=int((~labelled).sum()),
        accuracy=_of_some(metrics.accuracy_score, *compared),
        macro_f1=_of_some(metrics.f1_score, *compared, **macro),
        unknown_share=float((compared[1] < 0).mean()) if in_model.any() else math.nan,
        log_loss=loss,
        overall_accuracy=_of_some(metrics.accuracy_score, true_codes, guess_codes),
        adjusted_rand_index=_of_some(metrics.adjusted_rand_score, true_codes, guess_codes),
        per_class=_per_class(compared, (true_codes, guess_codes), present, names_present),
        confusion=_confusion(labels[labelled], guesses[labelled], names_present, others),
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


def _guess_codes(guesses: pd.Series[Any], names: list[str]) -> np.ndarray:
    """Codes of the predicted classes, int64 [c]; -1, which no true label has, for "unknown"."""
    import pandas as pd

    codes: np.ndarray = pd.Index(names).get_indexer(guesses)
    strange = guesses[(codes < 0) & (guesses != UNKNOWN).to_numpy()]
    if len(strange):
        raise InputError(
            f"predictions hold {first_names(list(map(str, strange.unique())))}, neither one of the "
            f"classes ({first_names(names)}) nor {UNKNOWN!r}"
        )
    return codes


def _of_some(score: Callable[..., Any], truth: np.ndarray, *others: Any, **options: Any) -> float:
    """A score of scikit-learn's, which refuses, or invents, one of no cells."""
    return float(score(truth, *others, **options)) if len(truth) else math.nan


def _per_class(
    compared: tuple[np.ndarray, np.ndarray],
    all_labelled: tuple[np.ndarray, np.ndarray],
    present: np.ndarray,
    classes: tuple[str, ...],
) -> pd.DataFrame:
    """The table from codes (truth, predicted) of cells of the model's classes, and of all."""
    import pandas as pd

    scores = _import_metrics().precision_recall_fscore_support
    zeros = np.zeros(len(present))
    columns = [
        scores(*codes, labels=present, zero_division=0) if len(codes[0]) else [zeros] * 4
        for codes in (compared, all_labelled)
    ]
    table = dict(zip(("precision", "recall", "f1", "cells"), columns[0], strict=True))
    table["overall_precision"] = columns[1][0]
    frame = pd.DataFrame(table, index=pd.Index(classes, name="class", dtype=object))
    return frame.astype({"cells": np.int64})


def _confusion(
    labels: pd.Series[Any], guesses: pd.Series[Any], classes: Sequence[str], others: Sequence[str]
) -> pd.DataFrame:
    import pandas as pd

    columns = [*classes, UNKNOWN] if (guesses == UNKNOWN).any() else list(classes)
    table = pd.crosstab(labels, guesses).reindex(
        index=pd.Index([*classes, *others], name="truth", dtype=object),
        columns=pd.Index(columns, name="predicted", dtype=object),
        fill_value=0,
    )
    return table.astype(np.int64)


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
