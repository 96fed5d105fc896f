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
from typing import TYPE_CHECKING

import numpy as np

from ..sources.tables import Table, joined

if TYPE_CHECKING:
    import zarr

logger = logging.getLogger("cellpatch_fast")

SOURCE_COLUMN = "cellpatch_input"  # tells several inputs apart
ROWS = 65_536  # of a column of strings that are in memory at a time, and of its chunks
SORTED_ROWS = 1 << 22  # of a column of strings that is put into another order, at a time


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
