"""Some of the inputs' cells instead of all: those that a query holds for, or whose rows are given.

The cells keep the order of the inputs, and obs of the store has their rows only. A query reads the
columns that it names, the rest of obs is read when it is copied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..io.sources.tables import Table

READ_ROWS = 65_536  # of a column of strings, of which some are wanted, at a time
QUOTED = "BACKTICK_QUOTED_STRING_"  # what pandas puts before a name in backticks


@dataclass(frozen=True, eq=False)
class Selection:
    """Which cells of the inputs to take; all by default.

    Parameters
    ----------
    obs_query
        What must hold for a cell's row of obs, as `pandas.DataFrame.query` reads it.
    rows
        Positions of the cells, counted from 0 through all inputs, ascending; or bool, one for each
        cell of the inputs.

    Raises
    ------
    InputError
        If both are given.
    """

    obs_query: str | None = None
    rows: ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.obs_query is not None and self.rows is not None:
            raise InputError("obs_query and rows exclude each other: choose cells by one of them")

    def of(self, tables: Sequence[Table], names: Sequence[str]) -> np.ndarray | None:
        """The chosen cells of the inputs, whose obs is ``tables``: int64, ascending; None for all.

        Raises
        ------
        InputError
            If a column or a row does not exist, the query is none, or there is no such cell.
        """
        cells = sum(map(len, tables))
        if self.rows is not None:
            return _checked_rows(np.asarray(self.rows), cells)
        if self.obs_query is None:
            return None
        parts = [
            _holds(self.obs_query, table, name) for table, name in zip(tables, names, strict=True)
        ]
        chosen = np.flatnonzero(np.concatenate(parts))
        if not len(chosen):
            raise InputError(
                f"the query {self.obs_query!r} holds for none of the {cells:,} cells of "
                f"{', '.join(names)}"
            )
        return chosen

    def record(self, chosen: np.ndarray | None) -> dict[str, str]:
        """What a store depends on, for what is kept with it."""
        if chosen is None:
            return {}
        if self.obs_query is not None:
            return {"obs_query": self.obs_query}
        digest = hashlib.sha256(np.ascontiguousarray(chosen, "<i8").data).hexdigest()
        return {"rows": f"{len(chosen)} rows, fingerprint {digest[:16]}"}


class SelectedTable:
    """Some rows of a `Table`.

    Parameters
    ----------
    table
        All of it.
    rows
        int64, ascending.
    """

    def __init__(self, table: Table, rows: np.ndarray) -> None:
        self._table, self._rows = table, rows
        self.index_name, self.columns = table.index_name, table.columns

    def __len__(self) -> int:
        return len(self._rows)

    def is_text(self, column: str) -> bool:
        return self._table.is_text(column)

    def texts(self, column: str, start: int, stop: int) -> np.ndarray:
        rows = self._rows[start:stop]
        pieces = [np.empty(0, object)]
        while len(rows):
            first = rows[0]
            near, rows = np.split(rows, [np.searchsorted(rows, first + READ_ROWS)])
            pieces.append(self._table.texts(column, int(first), int(near[-1]) + 1)[near - first])
        return np.concatenate(pieces)

    def values(self, column: str) -> Any:
        return self._table.values(column).take(self._rows)


def selected(tables: Sequence[Table], chosen: np.ndarray) -> list[Table]:
    """The ``chosen`` rows of tables that follow each other, as a table for each."""
    ends = np.cumsum([len(table) for table in tables])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    starts = ends - [len(table) for table in tables]
    return [
        SelectedTable(table, rows - start)
        for table, rows, start in zip(tables, parts, starts, strict=True)
    ]


def read_rows(path: str | Path) -> np.ndarray:
    """Positions of cells from a text file with one in each line: int64.

    Raises
    ------
    InputError
        If the file cannot be read or has other lines.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the rows {path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not re.fullmatch(r"\d{1,18}", line.strip(), re.ASCII):
            raise InputError(
                f"{path}, line {number}: expected the position of a cell, counted from 0, found "
                f"{line.strip()[:40]!r} (cells can be chosen by their names with --obs-query "
                "\"index in ['name', …]\")"
            )
        rows.append(int(line))
    return np.array(rows, np.int64)


def _checked_rows(rows: np.ndarray, cells: int) -> np.ndarray:
    if rows.dtype == bool:
        if rows.shape != (cells,):
            raise InputError(f"rows are bool {list(rows.shape)}, but the inputs have {cells} cells")
        rows = np.flatnonzero(rows)
    if not rows.size:
        raise InputError("rows choose no cell")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise InputError(
            f"rows must be positions of cells, or bool for each cell, found {rows.dtype} "
            f"{list(rows.shape)}"
        )
    outside = rows[(rows < 0) | (rows >= cells)]
    if len(outside):
        raise InputError(
            f"there is no row {outside[0]}: the inputs have {cells:,} cells, rows 0 to {cells - 1}"
        )
    rows = rows.astype(np.int64)
    (places,) = np.nonzero(np.diff(rows) <= 0)
    if len(places):
        before, after = rows[places[0] : places[0] + 2]
        raise InputError(
            f"rows must ascend, each once, because the store keeps the order of the inputs; found "
            f"{after} after {before} (numpy.unique(rows), or sort -nu FILE, puts them in order)"
        )
    return rows


def _holds(query: str, table: Table, name: str) -> np.ndarray:
    """bool [rows]: whether ``query`` holds for the rows of a table, called ``name``."""
    import pandas as pd

    def mentioned(word: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", query) is not None

    columns = [column for column in table.columns if mentioned(column)]
    index: Any = range(len(table))
    if mentioned("index") or mentioned(table.index_name):
        index = pd.Index(table.texts(table.index_name, 0, len(table)), name=table.index_name)
    frame = pd.DataFrame({column: table.values(column) for column in columns}, index=index)
    try:
        # variables of Python (@name) are none of the user's here
        result = frame.eval(query, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # pandas has one for every way to be wrong
        reason = str(error).replace(QUOTED, "")
        raise InputError(
            f"{name}: the query {query!r} cannot be answered: {reason}. Columns of obs: "
            f"{', '.join(table.columns) or 'none'}; 'index' are the names of the cells."
        ) from error
    if not isinstance(result, pd.Series) or not pd.api.types.is_bool_dtype(result.dtype):
        raise InputError(
            f"{name}: the query {query!r} says of no cell whether it is meant: write a condition, "
            'such as "tissue == \'blood\'" or "n_genes > 200"'
        )
    return np.asarray(result.fillna(False), bool)
