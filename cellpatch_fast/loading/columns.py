"""Columns of obs as arrays that a batch can take its rows from: numbers, or codes of categories.

Texts become categories in alphabetical order, so that the codes do not depend on which cell comes
first; what is a category already keeps its order. -1 is a missing category, NaN a missing number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from ..io.sources.tables import Table


@dataclass(frozen=True, eq=False)
class Column:
    """A column of obs.

    Parameters
    ----------
    values
        [cells]: codes (int8 to int32) or numbers.
    categories
        What the codes mean; None for numbers.
    """

    values: np.ndarray
    categories: np.ndarray | None


def read_column(tables: Sequence[Table], names: Sequence[str], column: str) -> Column:
    """The ``column`` of all ``tables`` together, one after the other.

    Raises
    ------
    InputError
        If one of the tables, called ``names``, has no such column.
    """
    import pandas as pd

    from ..io.sources.tables import joined

    for table, name in zip(tables, names, strict=True):
        if column not in table.columns:
            raise InputError(
                f"{name} has no column {column!r} in obs. Its columns: "
                f"{', '.join(table.columns) or 'none'}."
            )
    series = pd.Series(joined(tables, column))
    if pd.api.types.is_numeric_dtype(series):  # truth values too
        if series.isna().any():
            return Column(series.to_numpy(np.float64, na_value=np.nan), None)
        return Column(series.to_numpy(), None)
    if not isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype("category")
    codes = series.cat.codes.to_numpy()
    return Column(codes, series.cat.categories.to_numpy())


def read_names(tables: Sequence[Table], names: Sequence[str], column: str) -> np.ndarray:
    """The classes in a column, as text: object [cells], None where one is missing.

    Raises
    ------
    InputError
        If one of the tables, called ``names``, has no such column, or it holds numbers that are
        no names.
    """
    classes = read_column(tables, names, column)
    if classes.categories is not None:
        texts = np.array([*map(str, classes.categories), None], object)  # -1 is the last
        chosen: np.ndarray = texts[classes.values]
        return chosen
    if classes.values.dtype.kind not in "biu":
        raise InputError(
            f"obs[{column!r}] holds numbers such as {classes.values[0]:.6g}, but classes need "
            "names: choose another column"
        )
    return classes.values.astype(str).astype(object)


def balancing_weights(column: Column, name: str) -> np.ndarray:
    """float64 [cells]: all categories together weigh the same; missing ones nothing.

    Raises
    ------
    InputError
        If the column holds numbers, or nothing.
    """
    if column.categories is None:
        raise InputError(f"obs[{name!r}] holds numbers: only categories can be balanced")
    counts = np.bincount(column.values[column.values >= 0], minlength=len(column.categories))
    if not counts.sum():
        raise InputError(f"obs[{name!r}] is missing in every cell")
    weights = np.zeros(len(column.values))
    present = column.values >= 0
    weights[present] = 1 / counts[column.values[present]]
    return weights
