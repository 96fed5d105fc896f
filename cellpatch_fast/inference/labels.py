"""From probabilities of classes to labels, and what these are compared with."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, warn
from ..genes.names import first_names
from ..loading.columns import read_names
from .evaluation import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

    from ..io.sources.tables import Table

logger = logging.getLogger("cellpatch_fast")


def require_threshold(threshold: float, classes: Sequence[str], *, compared: bool = False) -> None:
    """Refuse what is no probability, and a class that is called as what is below it.

    ``compared``: with true labels, where the class would stand for cells below a threshold too.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is a probability, from 0 to 1; found {threshold}")
    if UNKNOWN in classes and (threshold or compared):
        raise InputError(
            f"the model has a class {UNKNOWN!r}, so cells below a threshold could not be told from "
            "its cells: annotate without --threshold and --label (threshold=, label=), or train a "
            "model whose classes do not have that name"
        )


def read_label_map(path: str | Path) -> dict[str, str]:
    """What names in the data are called in the model, from a csv file of two columns.

    The first line is a pair like any other; `true_labels` knows a header by its pair.

    Raises
    ------
    InputError
        If the file cannot be read, has another number of columns somewhere, or gives one name two
        meanings.
    """
    targets: dict[str, str] = {}
    try:
        # utf-8-sig: spreadsheets write a mark at the beginning, which is part of no name
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True, strict=True)
            rows = [(lines.line_num, row) for row in lines if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the label map {path} cannot be read: {error}") from error
    for number, row in rows:
        if len(row) != 2 or not all(row):
            raise InputError(
                f"{path}, line {number}: expected two columns, a name in the data and its name in "
                f"the model, with a comma between them; found {','.join(row)!r}"
            )
        name, target = row
        if targets.setdefault(name, target) != target:
            raise InputError(
                f"{path}, line {number}: {name!r} is {target!r} here and {targets[name]!r} further "
                "up: keep one of the two"
            )
    if not targets:
        raise InputError(f"the label map {path} is empty: write lines such as 'B cells,B'")
    return targets


def true_labels(
    tables: Sequence[Table],
    names: Sequence[str],
    column: str,
    label_map: Mapping[str, str] | None,
    classes: Sequence[str],
) -> np.ndarray:
    """The true labels of all cells, as the model calls them: object [cells], None without one.

    Warns of labels that are not among the model's classes, and of what in the map has no effect.

    Parameters
    ----------
    tables, names, column
        See `columns.read_names`.
    label_map
        Other names of labels. A first pair of which neither name occurs, in the data or in the
        model, is the header of a table.
    classes
        The model's.
    """
    truth = read_names(tables, names, column)
    if label_map:
        renamed = {str(name): str(target) for name, target in label_map.items()}
        _warn_of_no_effect(renamed, set(truth), classes)
        truth = np.array([renamed.get(name, name) for name in truth], object)
    counts = Counter(name for name in truth if name is not None)
    others = {name: count for name, count in counts.most_common() if name not in classes}
    if others:
        warn(
            f"{sum(others.values()):,} of {counts.total():,} labelled cells have a label in "
            f"obs[{column!r}] that is not among the model's classes: {first_names(list(others))} "
            f"({len(others):,} labels); the classes are {first_names(list(classes))} "
            f"({len(classes):,}). All cells are annotated. If it is the right column and the right "
            "model, --label-map (label_map=) can say what the model calls them"
        )
    return truth


def _warn_of_no_effect(
    label_map: Mapping[str, str], labels: Collection[str], classes: Collection[str]
) -> None:
    pairs = list(label_map.items())
    if pairs[0][0] not in labels and pairs[0][1] not in classes:
        logger.info("label map: %r, %r is taken for a header", *pairs.pop(0))
    if absent := [name for name, _ in pairs if name not in labels]:
        warn(f"label map: no cell has the label {_listed(absent)}")
    if strange := [target for _, target in pairs if target not in classes]:
        warn(
            f"label map: {_listed(strange)} is not among the model's classes, which are "
            f"{_listed(classes)}"
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))


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
