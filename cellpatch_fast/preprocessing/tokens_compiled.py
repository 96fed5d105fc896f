"""The pass of `tokens` over the entries of each cell, compiled, without the GIL.

Small loops over slices of one cell, which stay in the fastest cache, each simple enough for the
compiler to make vectors of.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from .ordering import order_entries

SAMPLE = 16  # entries of a cell tell whether its values are whole


@njit(nogil=True, cache=True)
def tokenize_cells(
    indptr: Any,  # [rows + 1]
    indices: Any,  # [n]
    data: Any,  # [n]
    order: Any,  # [c]
    tokens: Any,  # [columns]
    target_sum: float,
    logged: bool,
    discrete: bool,
    boundaries: Any,  # [largest value]
    clip: float,
    genes: Any,  # to be filled
    values: Any,  # likewise
    offsets: Any,  # [c + 1], likewise
    unknown: Any,  # [c], likewise
    libraries: Any,  # [c], likewise
    highest: Any,  # [c], likewise
    whole: Any,  # [c], likewise
    longest: int,
    digit: int,
) -> int:
    """Write one cell behind the other; returns the place in ``order`` that is refused, or -1."""
    half_genes, half_values = np.empty(longest, genes.dtype), np.empty(longest, values.dtype)
    counts = np.empty(1 << digit, np.uint32)
    thresholds = np.empty(len(boundaries), data.dtype)
    for place in range(len(order)):
        cell = order[place]
        entries = slice(indptr[cell], indptr[cell + 1])
        row, columns = data[entries], indices[entries]
        start = offsets[place]
        stop = start + len(row)  # unless some entries are left out
        libraries[place] = library = library_size(row)
        scale = 1.0
        if not logged and library > 0:
            scale = target_sum / library
        valid, highest[place] = _check(row, columns, len(tokens))
        if not (valid and library < np.inf and scale < np.inf):
            return place
        whole[place] = _is_whole(row[:SAMPLE])
        if discrete:
            _find_thresholds(boundaries, scale, thresholds)
            _count_thresholds(row, thresholds, values[start:stop])
        else:
            _clip_values(row, scale, logged, clip, values[start:stop])
        unknown[place] = 0
        if not _look_up(row, columns, tokens, genes[start:stop]):
            kept, unknown[place] = _keep_known(
                row, columns, tokens, genes[start:stop], values[start:stop]
            )
            stop = start + kept
        order_entries(genes[start:stop], values[start:stop], half_genes, half_values, counts)
        offsets[place + 1] = stop
    return -1


@njit(nogil=True, cache=True)
def library_size(row: Any) -> float:
    """The sum of a cell; infinite or not a number if an entry is.

    Eight sums, whatever the machine's vector width: entry e belongs to the sum e % 8.
    """
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
    whole = len(row) // 8 * 8
    for entry in range(0, whole, 8):
        a0 += row[entry]
        a1 += row[entry + 1]
        a2 += row[entry + 2]
        a3 += row[entry + 3]
        a4 += row[entry + 4]
        a5 += row[entry + 5]
        a6 += row[entry + 6]
        a7 += row[entry + 7]
    for entry in range(whole, len(row)):
        a0 += row[entry]
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


@njit(nogil=True, cache=True)
def _check(row: Any, columns: Any, genes: int) -> tuple[bool, float]:
    """Whether no entry is negative or of a column that does not exist; the highest."""
    if not len(row):
        return True, 0.0
    lowest, highest, first, last = row[0], row[0], columns[0], columns[0]
    for entry in range(len(row)):
        lowest = min(lowest, row[entry])
        highest = max(highest, row[entry])
        first = min(first, columns[entry])
        last = max(last, columns[entry])
    return lowest >= 0 and first >= 0 and last < genes, highest


@njit(nogil=True, cache=True)
def _is_whole(row: Any) -> bool:
    fractions = 0
    for entry in range(len(row)):
        fractions += row[entry] != np.rint(row[entry])
    return fractions == 0


@njit(nogil=True, cache=True)
def _find_thresholds(boundaries: Any, scale: float, thresholds: Any) -> None:
    """The smallest numbers whose product with ``scale`` reaches each of the ``boundaries``.

    The product in float64 never decreases when the number grows, so comparing numbers, which
    needs neither a product nor float64, is the same as comparing products.
    """
    ends = np.empty(2, thresholds.dtype)  # of the type's own infinities, which set the step
    ends[0], ends[1] = -np.inf, np.inf
    for place in range(len(boundaries)):
        boundary = boundaries[place]
        thresholds[place] = boundary / scale  # off by a rounding or two
        while thresholds[place] * scale >= boundary:
            thresholds[place] = np.nextafter(thresholds[place], ends[0])
        while thresholds[place] * scale < boundary:
            thresholds[place] = np.nextafter(thresholds[place], ends[1])


@njit(nogil=True, cache=True)
def _count_thresholds(row: Any, thresholds: Any, out: Any) -> None:
    out[:] = 0
    for threshold in thresholds:
        for entry in range(len(row)):
            out[entry] += row[entry] >= threshold


@njit(nogil=True, cache=True)
def _clip_values(row: Any, scale: float, logged: bool, clip: float, out: Any) -> None:
    for entry in range(len(row)):
        value = row[entry] * scale
        out[entry] = min(value if logged else math.log1p(value), clip)


@njit(nogil=True, cache=True)
def _look_up(row: Any, columns: Any, tokens: Any, genes: Any) -> bool:
    """Write the token of every entry; whether all are known and none of the values is 0."""
    signs, zeros = np.int32(0), 0
    for entry in range(len(row)):
        token = tokens[np.uint32(columns[entry])]  # unsigned: no counting from the end
        genes[entry] = token
        signs |= token
    for entry in range(len(row)):
        zeros += row[entry] == 0
    return bool(signs >= 0 and zeros == 0)


@njit(nogil=True, cache=True)
def _keep_known(row: Any, columns: Any, tokens: Any, genes: Any, values: Any) -> tuple[int, int]:
    """Move the non-zero entries of known genes to the front; how many they are, and the others."""
    kept = 0
    present = 0
    for entry in range(len(row)):
        token = tokens[np.uint32(columns[entry])]
        genes[kept] = token  # overwritten by the next entry unless this one is kept
        values[kept] = values[entry]
        present += row[entry] != 0
        kept += (row[entry] != 0) & (token >= 0)
    return kept, present - kept
