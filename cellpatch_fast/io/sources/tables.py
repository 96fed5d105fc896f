"""The annotation of cells as it is read: a table's columns, one at a time.

A table of ten million cells takes gigabytes as a pandas frame, nearly all of it strings, so
nothing here reads more of a table than one column, or a range of rows of one. Files of
anndata < 0.8 encode tables otherwise and are read whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import InputError
from ..interfaces import reading
from .containers import Container, text

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("cellpatch_fast")


class Table(Protocol):
    """Annotation of cells, read by columns."""

    @property
    def index_name(self) -> str: ...

    @property
    def columns(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def is_text(self, column: str) -> bool:
        """Whether a column holds strings, all of them present. The index always does."""

    def texts(self, column: str, start: int, stop: int) -> np.ndarray:
        """The rows ``start : stop`` of the index or a column of strings, as objects."""

    def values(self, column: str) -> Any:
        """A whole column: a NumPy array or a pandas extension array."""


class FrameTable:
    """A table in memory. Names of columns that are no strings, such as 0, are taken as such.

    Raises
    ------
    InputError
        If two columns then have the same name.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.index_name = str(frame.index.name or "_index")
        names = [str(column) for column in frame.columns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"obs has several columns called {twice!r}: rename or drop some")
        self._places = {name: place for place, name in enumerate(names)}
        self.columns = [name for name in names if name != self.index_name]

    def __len__(self) -> int:
        return len(self._frame)

    def is_text(self, column: str) -> bool:
        from pandas.api.types import infer_dtype

        values = self._series(column)
        return not values.hasnans and infer_dtype(values, skipna=False) == "string"

    def texts(self, column: str, start: int, stop: int) -> np.ndarray:
        values = self._frame.index if column == self.index_name else self._series(column)
        return values[start:stop].astype(str).to_numpy(object)

    def values(self, column: str) -> Any:
        return self._series(column)._values  # what anndata itself writes

    def _series(self, column: str) -> pd.Series[Any]:
        return self._frame.iloc[:, self._places[column]]


class StoredTable:
    """A table in an .h5ad file or .zarr store.

    Raises
    ------
    InputError
        If it is damaged.
    """

    def __init__(self, container: Container, key: str, rows: int) -> None:
        self._container, self._key, self._rows = container, key, rows
        with reading(container.name, key):
            attributes = dict(container.root[key].attrs)
            self.index_name = text(attributes["_index"])
            self.columns = [text(column) for column in attributes["column-order"]]

    @staticmethod
    def can_read(container: Container, key: str) -> bool:
        """Whether the encoding is the one that anndata has written since 0.8."""
        attributes = container.element(key).attrs
        return (
            text(attributes.get("encoding-type")) == "dataframe"
            and text(attributes.get("encoding-version")) == "0.2.0"
        )

    def __len__(self) -> int:
        return self._rows

    def is_text(self, column: str) -> bool:
        element = self._element(column)
        encoding = text(element.attrs.get("encoding-type"))
        return hasattr(element, "shape") and encoding == "string-array"

    def texts(self, column: str, start: int, stop: int) -> np.ndarray:
        if column == self.index_name and not hasattr(self._element(column), "shape"):
            values = np.asarray(self.values(column)[start:stop])  # e.g. a categorical index
        else:
            with reading(
                self._container.name, f"rows {start} to {stop - 1} of {self._key}/{column}"
            ):
                values = self._element(column)[start:stop]
        if values.dtype == object:  # h5py's strings are bytes
            return np.array([text(value) for value in values], object)
        if values.dtype.kind == "T":  # NumPy's strings of any length
            return values.astype(object)
        return values.astype(str).astype(object)

    def values(self, column: str) -> Any:
        from anndata.io import read_elem

        with reading(self._container.name, f"{self._key}/{column}"):
            values = read_elem(self._container.root[f"{self._key}/{column}"])
        if len(values) != self._rows:
            raise InputError(
                f"{self._container.name}: {self._key}/{column} has {len(values)} values for "
                f"{self._rows} rows. Have the file written anew."
            )
        return values

    def _element(self, column: str) -> Any:
        return self._container.element(f"{self._key}/{column}")


def joined(tables: Sequence[Table], column: str) -> Any:
    """One column of all tables together, missing where a table lacks it."""
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    if len(tables) == 1:
        return tables[0].values(column)
    parts = [
        pd.Series(table.values(column)) if column in table.columns else None for table in tables
    ]
    present = [part for part in parts if part is not None]
    if all(is_numeric_dtype(part) for part in present):  # truth values too
        dtype = _nullable(present[0].dtype)
        missing = np.nan if dtype.startswith("float") else pd.NA
        joined = pd.concat(
            [
                pd.Series(missing, range(len(table)), dtype) if part is None else part
                for part, table in zip(parts, tables, strict=True)
            ],
            ignore_index=True,
        )
        if joined.dtype != object:
            return joined._values
    return _joined_categories(parts, [len(table) for table in tables], column)


def _nullable(dtype: Any) -> str:
    """A type like ``dtype`` (of numbers or truth values) that can be missing."""
    name = str(dtype)
    if name.startswith("float"):
        return name
    return "boolean" if name == "bool" else name.replace("i", "I").replace("u", "U")


def _joined_categories(parts: Sequence[Any], lengths: Sequence[int], column: str) -> Any:
    """Texts and categories as categories, in the order in which they come up."""
    import pandas as pd
    from pandas.api.types import union_categoricals

    present = [part for part in parts if part is not None]
    types = {getattr(part.dtype, "categories", part).dtype.kind for part in present}
    if len(types) > 1:
        logger.warning("obs[%r] holds different types in different inputs: kept as text", column)
        present = [part.astype(object).map(str, na_action="ignore") for part in present]
    there = iter([part.astype("category")._values for part in present])
    first = present[0].astype("category").dtype
    joined = [
        pd.Categorical.from_codes(np.full(length, -1), dtype=first) if part is None else next(there)
        for part, length in zip(parts, lengths, strict=True)
    ]
    same = len({part.dtype for part in joined}) == 1
    return union_categoricals(joined, ignore_order=not same)
