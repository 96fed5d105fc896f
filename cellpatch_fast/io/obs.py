"""The annotation of cells, copied from inputs to a store in bounded memory.

A table of ten million cells takes gigabytes as a pandas frame, nearly all of it strings. So
columns are copied one at a time, and columns of strings (the names of cells too) in ranges of
rows. What anndata encodes comes out as it went in: numbers, truth values, categories with their
order, nullable columns. Files of anndata < 0.8 encode tables otherwise and are read whole.

The rows of several inputs follow each other, as `anndata.concat` with ``join="outer"`` would
have them: a column that an input lacks is missing there. They can be put into another order. For
strings that means reading a column as often as it has `SORTED_ROWS` rows, each time keeping those
that come next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import InputError
from .arrays import reading
from .containers import Container, text

if TYPE_CHECKING:
    import pandas as pd
    import zarr

logger = logging.getLogger("cellpatch_fast")

SOURCE_COLUMN = "cellpatch_input"  # tells several inputs apart
ROWS = 65_536  # of a column of strings that are in memory at a time, and of its chunks
SORTED_ROWS = 1 << 22  # of a column of strings that is put into another order, at a time


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
    """A table in memory."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.index_name = str(frame.index.name or "_index")
        self.columns = [str(column) for column in frame.columns if column != self.index_name]

    def __len__(self) -> int:
        return len(self._frame)

    def is_text(self, column: str) -> bool:
        from pandas.api.types import infer_dtype

        values = self._frame[column]
        return not values.hasnans and infer_dtype(values, skipna=False) == "string"

    def texts(self, column: str, start: int, stop: int) -> np.ndarray:
        values = self._frame.index if column == self.index_name else self._frame[column]
        return values[start:stop].astype(str).to_numpy(object)

    def values(self, column: str) -> Any:
        return self._frame[column]._values  # what anndata itself writes


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


def write_obs(
    root: zarr.Group,
    tables: Sequence[Table],
    names: Sequence[str],
    rows: np.ndarray | None = None,
) -> None:
    """Write the group ``obs`` of an AnnData Zarr store.

    Parameters
    ----------
    root
        The store's root, which has no ``obs`` yet.
    tables
        The annotations of the inputs, whose rows follow each other.
    names
        What each input is called in the column `SOURCE_COLUMN`, which tells several apart; each
        once.
    rows
        int64 [cells]: the row of each cell in the store, a permutation. None: cells stay in the
        order of the inputs.
    """
    import pandas as pd
    from anndata.io import write_elem

    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    sources = None
    if len(tables) > 1:
        if SOURCE_COLUMN in columns:
            logger.warning("obs[%r] of the inputs is replaced", SOURCE_COLUMN)
            columns.remove(SOURCE_COLUMN)
        codes = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        sources = pd.Categorical.from_codes(codes, categories=list(names))
    index_names = {table.index_name for table in tables}
    index_name = index_names.pop() if len(index_names) == 1 else "_index"
    index_name = "_index" if index_name in columns else index_name

    listed = [*columns, SOURCE_COLUMN] if sources is not None else columns
    group = root.create_group(
        "obs",
        attributes={
            "_index": index_name,
            "column-order": listed,
            "encoding-type": "dataframe",
            "encoding-version": "0.2.0",
        },
    )
    order = None if rows is None else np.argsort(rows)
    _write_texts(group, index_name, [(table, table.index_name) for table in tables], rows)
    for column in columns:
        if all(column in table.columns and table.is_text(column) for table in tables):
            _write_texts(group, column, [(table, column) for table in tables], rows)
        else:
            values = joined(tables, column)
            write_elem(group, column, values if order is None else values.take(order))
    if sources is not None:
        write_elem(group, SOURCE_COLUMN, sources if order is None else sources.take(order))


def _write_texts(
    group: zarr.Group, name: str, parts: Sequence[tuple[Table, str]], rows: np.ndarray | None
) -> None:
    """Write a column of strings, range by range."""
    array = group.create_array(
        name,
        shape=(sum(len(table) for table, _ in parts),),
        dtype=str,
        chunks=(ROWS,),
        attributes={"encoding-type": "string-array", "encoding-version": "0.2.0"},
    )
    done = 0
    pieces = _ranges(parts) if rows is None else _sorted_ranges(parts, rows)
    for values in _filled(pieces, ROWS):
        array[done : done + len(values)] = values
        done += len(values)


def _ranges(parts: Sequence[tuple[Table, str]]) -> Iterator[np.ndarray]:
    for table, column in parts:
        for start in range(0, len(table), ROWS):
            yield table.texts(column, start, min(start + ROWS, len(table)))


def _sorted_ranges(parts: Sequence[tuple[Table, str]], rows: np.ndarray) -> Iterator[np.ndarray]:
    """The strings in the order of ``rows``, `SORTED_ROWS` at a time."""
    for first in range(0, len(rows), SORTED_ROWS):
        chosen = np.empty(min(SORTED_ROWS, len(rows) - first), object)
        start = 0
        for piece in _ranges(parts):
            places = rows[start : start + len(piece)] - first
            here = (places >= 0) & (places < len(chosen))
            chosen[places[here]] = piece[here]
            start += len(piece)
        yield chosen


def _filled(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The pieces' elements in arrays of ``size``, the last one shorter: each fills a chunk."""
    held = np.empty(0, object)
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if len(held):
        yield held


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
