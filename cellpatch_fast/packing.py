"""Packed cells, each with its entries in order: by token, then by value.

The order is one of the cell's content, so whatever order a file lists a cell's genes in, the
packed cell has the same bits. Files that already follow the vocabulary are only copied.

Otherwise a radix sort by token in two digits, each of half the bits of the vocabulary's highest
token: for the human genes 256 buckets, which stay in the fastest cache, and no comparison.
Entries of the same token come from names that mean the same gene. They are rare, so what
remains unordered among them is left to an insertion sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .kernels.threads import run_blocks

__all__ = ["pack_in_order"]

CELLS_PER_TASK = 64  # some 0.1 to 1 ms of work between two tickets of a thread


def pack_in_order(
    starts: np.ndarray,
    lengths: np.ndarray,
    genes: np.ndarray,
    values: np.ndarray,
    vocabulary_size: int,
    *,
    places: np.ndarray,
    packed_genes: np.ndarray,
    packed_values: np.ndarray,
) -> None:
    """Copy cells to where they belong, bringing each cell's entries into their order.

    Parameters
    ----------
    starts
        int64 [cells]: where each cell's entries start in ``genes`` and ``values``.
    lengths
        int64 [cells]: how many entries each cell has.
    genes
        Tokens of the entries, below ``vocabulary_size``; uint16 or int32.
    values
        Values of the entries, none of them NaN; uint8 or float32.
    vocabulary_size
        The highest token plus one.
    places
        int64 [cells]: where each cell's entries start in ``packed_genes`` and ``packed_values``.
    packed_genes, packed_values
        To be written, of the types of ``genes`` and ``values``.
    """
    digit = ((vocabulary_size - 1).bit_length() + 1) // 2  # bits; two digits hold any token

    def pack_range(start: int, stop: int) -> None:
        part = slice(start, stop)
        cells = starts[part], lengths[part], places[part]
        _pack_cells(*cells, genes, values, packed_genes, packed_values, digit)

    run_blocks(pack_range, len(lengths), CELLS_PER_TASK)


@njit(nogil=True, cache=True)
def _pack_cells(
    starts: Any,  # [c]
    lengths: Any,  # [c]
    places: Any,  # [c]
    genes: Any,  # [n]
    values: Any,  # [n]
    packed_genes: Any,  # [packed n]
    packed_values: Any,  # [packed n]
    digit: int,
) -> None:
    longest = 0
    for length in lengths:
        longest = max(longest, length)
    half_genes, half_values = np.empty(longest, genes.dtype), np.empty(longest, values.dtype)
    counts = np.empty(1 << digit, np.uint32)
    for cell in range(len(lengths)):
        length = lengths[cell]
        source = slice(starts[cell], starts[cell] + length)
        target = slice(places[cell], places[cell] + length)
        to_genes, to_values = packed_genes[target], packed_values[target]
        if _is_ascending(genes[source]):
            to_genes[:] = genes[source]
            to_values[:] = values[source]
            continue
        by_digit = half_genes[:length], half_values[:length]
        _sort_by_digit(genes[source], values[source], *by_digit, counts, 0)
        _sort_by_digit(*by_digit, to_genes, to_values, counts, digit)
        if not _is_ascending(to_genes):
            _order_repeated(to_genes, to_values)


@njit(nogil=True, cache=True)
def _is_ascending(genes: Any) -> bool:
    """Whether the tokens are in order and none is repeated."""
    wrong = 0
    for entry in range(1, len(genes)):
        wrong += genes[entry] <= genes[entry - 1]
    return wrong == 0


@njit(nogil=True, cache=True)
def _sort_by_digit(
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
