"""The order of a cell's entries: by token, then by value.

The order is one of the cell's content, so whatever order a file lists a cell's genes in, the
cell has the same bits. Files that already follow the vocabulary are left as they are.

Otherwise a radix sort by token in two digits, each of half the bits of the vocabulary's highest
token: for the human genes 256 buckets, which stay in the fastest cache, and no comparison.
Entries of the same token come from names that mean the same gene. They are rare, so what
remains unordered among them is left to an insertion sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["digit_bits", "order_entries", "sort_by_digit"]


def digit_bits(vocabulary_size: int) -> int:
    """Bits of a digit, two of which hold any token below ``vocabulary_size``."""
    return ((vocabulary_size - 1).bit_length() + 1) // 2


@njit(nogil=True, cache=True)
def order_entries(genes: Any, values: Any, half_genes: Any, half_values: Any, counts: Any) -> None:
    """Bring the entries of one cell into their order.

    Parameters
    ----------
    genes
        Tokens; uint16 or int32 [entries].
    values
        Their values, none of them NaN; uint8 or float32 [entries].
    half_genes, half_values
        Room for as many entries.
    counts
        Room for uint32 [2 ** digit_bits(vocabulary_size)].
    """
    if _is_ascending(genes):
        return
    by_digit = half_genes[: len(genes)], half_values[: len(genes)]
    digit = 0
    while 1 << digit < len(counts):
        digit += 1
    sort_by_digit(genes, values, *by_digit, counts, 0)
    sort_by_digit(*by_digit, genes, values, counts, digit)
    if not _is_ascending(genes):
        _order_repeated(genes, values)


@njit(nogil=True, cache=True)
def _is_ascending(genes: Any) -> bool:
    """Whether the tokens are in order and none is repeated."""
    wrong = 0
    for entry in range(1, len(genes)):
        wrong += genes[entry] <= genes[entry - 1]
    return wrong == 0


@njit(nogil=True, cache=True)
def sort_by_digit(
    genes: Any, values: Any, to_genes: Any, to_values: Any, places: Any, shift: int
) -> None:
    """Stable sort by the digit of the tokens that starts at bit ``shift``.

    ``places`` [values of a digit] holds, for each of them, first how many entries have it, then
    where the next of them goes.
    """
    mask = np.uint32(len(places) - 1)
    places[:] = 0
    for entry in range(len(genes)):
        places[np.uint32(genes[entry] >> shift) & mask] += 1
    before = 0
    for bucket in range(len(places)):
        count = places[bucket]
        places[bucket] = before
        before += count
    for entry in range(len(genes)):
        key = np.uint32(genes[entry] >> shift) & mask
        place = places[key]
        to_genes[place] = genes[entry]
        to_values[place] = values[entry]
        places[key] = place + 1


@njit(nogil=True, cache=True)
def _order_repeated(genes: Any, values: Any) -> None:
    """Insertion sort by value among entries of the same token."""
    for entry in range(1, len(genes)):
        place = entry
        while place and genes[place - 1] == genes[place] and values[place - 1] > values[place]:
            values[place - 1], values[place] = values[place], values[place - 1]
            place -= 1
