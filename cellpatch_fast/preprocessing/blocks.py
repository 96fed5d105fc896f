"""Blocks of rows as the arithmetic needs them, and what is said of an entry that cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from ..cells import CellBlock


def readable_block(block: CellBlock, name: str) -> CellBlock:
    """``block`` with int64 row pointers and int32, int64 or uint16 indices; its data stay.

    Raises
    ------
    InputError
        If the values are not numbers, or the three arrays do not fit together.
    """
    data, indptr, indices = (np.asarray(x) for x in (block.data, block.indptr, block.indices))
    if data.dtype.kind not in "buif":
        raise InputError(f"{name}: the matrix holds values of type {data.dtype}, not numbers.")
    if (
        len(indptr) == 0
        or indptr[0] != 0
        or (np.diff(indptr) < 0).any()
        or not indptr[-1] == len(indices) == len(data)
    ):
        raise InputError(
            f"{name}: the sparse matrix is damaged near cell {block.start}: its row pointers do "
            "not fit its values. Write the file again."
        )
    if indices.dtype.kind == "u" and indices.dtype.itemsize >= 4:
        indices = indices.view(f"{indices.dtype.byteorder}i{indices.dtype.itemsize}")
    wide = np.dtype(np.int64) if indices.dtype.itemsize == 8 else np.dtype(np.int32)
    if indices.dtype == np.uint16:  # as files of fewer genes may store them: half to read
        wide = indices.dtype
    return dataclasses.replace(
        block,
        indptr=np.ascontiguousarray(indptr, dtype=np.int64),
        indices=np.ascontiguousarray(indices, dtype=wide),
        data=data,
    )


def floating_type(dtype: np.dtype) -> np.dtype:
    """The type that values of a number type are computed in: float32 or float64.

    It holds them exactly, except that integers beyond 2^53 are rounded to float64.
    """
    floating = np.promote_types(dtype, np.float32)
    return np.dtype(np.float64) if floating.itemsize > 8 else floating


def invalid_entry(
    block: CellBlock, entry: int, name: str, gene_names: Sequence[str] | None
) -> InputError:
    """The error that says what is wrong with one entry of a block, and in which cell and gene."""
    cell = block.position(int(np.searchsorted(block.indptr, entry, side="right")) - 1)
    column, value = int(block.indices[entry]), float(block.data[entry])
    gene = f"gene column {column}"
    if gene_names is not None and 0 <= column < len(gene_names):
        gene += f" ({gene_names[column]})"
    what = f"{name}: cell {cell} (the first is 0), {gene}: the value is {value:.6g}"
    if value < 0:
        return InputError(
            f"{what}. Counts and their logarithms are never negative; scaled data are. Choose "
            "the raw counts with layer or use_raw."
        )
    return InputError(
        f"{what}, which is not a finite number. Correct or remove this cell, or choose another "
        "matrix with layer or use_raw."
    )
