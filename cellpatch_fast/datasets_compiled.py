"""The compiled part of `datasets`: cells drawn one after the other, without the GIL.

A gene with mean 2·x has a count that is the sum of two geometric numbers, so it is detected with
chance 1 − 1 / (1 + x)². Genes are visited from the most common to the rarest. Common ones are asked
one by one. Rare ones would mostly be asked in vain: there, an exponential number says where the
next candidate is, as if all genes of a stretch were as common as its first, and the candidate is
accepted with the share to which it is rarer. A bitmap of what was found is then read in the order
of columns, which is how a cell comes out sorted.

Random numbers come from a cell's own sequences (SplitMix64), so it does not matter which cells are
drawn together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .masking_compiled import hash_integer

__all__ = ["Law", "draw_cells", "hash_seed"]

ONE = np.uint64(1)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)  # its product with 2^i differs in the top 6 bits
PLACES = np.zeros(64, np.uint8)  # i, by those bits
PLACES[[((1 << i) * int(DE_BRUIJN) % 2**64) >> 58 for i in range(64)]] = np.arange(64)

ASKED = 0.04  # x from which each gene is asked; detected with chance 0.24
INVERTED = 4.0  # x up to which a count is found by going up the distribution, step by step


class Law(NamedTuple):
    """What cells are drawn from. Ranks r run from the most common gene to the rarest."""

    halves: np.ndarray  # float32 [r]: half of a gene's mean count at depth 1
    columns: np.ndarray  # int32 [r]: of the gene, in the matrix
    stretches: np.ndarray  # int64 [s + 1]: bounds of ranks with similar means
    efficiencies: np.ndarray  # float32 [batches, r]: up to 1; that of means in a batch
    markers: np.ndarray  # int64 [types, markers]: their ranks
    fold: float  # of a marker's mean in its type
    types: np.ndarray  # float64 [types]: cumulative shares of cells
    donors: int  # donor d belongs to batch d modulo batches
    log_genes: float  # median of the logarithm of genes per cell
    spread: float  # its standard deviation
    log_lengths: np.ndarray  # float64 [l]: ascending; at most the last one is drawn
    log_depths: np.ndarray  # float64 [l]: the depth that leads to so many genes


@njit(nogil=True, cache=True)
def hash_seed(seed: int) -> Any:
    """The key that cells are drawn with: uint64."""
    return hash_integer(np.uint64(seed))


@njit(nogil=True, cache=True)
def draw_cells(
    law: Any,
    key: Any,  # uint64, see `hash_seed`
    start: int,
    stop: int,
    types: Any,  # [stop - start], to be written, as are all that follow
    donors: Any,
    lengths: Any,
    columns: Any,  # [n]
    counts: Any,  # [n]
) -> int:
    """Draw the cells from ``start`` while there is room for any cell; how many were drawn."""
    genes = len(law.columns)
    detected = np.zeros((genes + 63) // 64, np.uint64)  # a bit for each column
    found = np.empty(genes, np.float32)  # its count
    hits = np.empty(genes + 1, np.int64)  # ranks of detected genes
    beyond = np.empty(genes)  # [r]: what the count of a detected gene follows from
    end = 0
    for cell in range(start, stop):
        if end + genes > len(columns):
            return cell - start
        state = hash_integer(key ^ np.uint64(cell))
        kind = np.searchsorted(law.types, _uniform(state), side="right")
        donor = int(_uniform(state + GOLDEN) * law.donors)
        radius = math.sqrt(-2 * math.log(_uniform(state + GOLDEN * np.uint64(2))))
        angle = 2 * math.pi * _uniform(state + GOLDEN * np.uint64(3))
        depth = _depth(law, law.log_genes + law.spread * radius * math.cos(angle))
        efficiencies = law.efficiencies[donor % len(law.efficiencies)]

        asked, first = 0, 0
        while first < len(law.stretches) - 1 and depth * law.halves[asked] > ASKED:
            first += 1
            asked = law.stretches[first]
        # each part of a cell has a sequence of its own
        state = hash_integer(state)
        number = _ask(law.halves, efficiencies, depth, asked, state, hits, beyond)
        state = hash_integer(state)
        number = _search(
            law.halves, efficiencies, law.stretches[first:], depth, state, number, hits, beyond
        )
        state = hash_integer(state)
        _count(
            law.halves, efficiencies, law.columns, depth, state, hits[:number], beyond,
            detected, found,
        )  # fmt: skip
        state = hash_integer(state)
        for rank in law.markers[kind]:  # drawn anew, with the mean that they have here
            column = law.columns[rank]
            detected[column >> 6] &= ~(ONE << np.uint64(column & 63))
            x = depth * law.fold * law.halves[rank] * efficiencies[rank]
            count = _sum_of_geometric(x, state)
            state += GOLDEN * np.uint64(2)
            if count:
                detected[column >> 6] |= ONE << np.uint64(column & 63)
                found[column] = count

        begin, end = end, _collect(detected, found, columns, counts, end)
        types[cell - start], donors[cell - start] = kind, donor
        lengths[cell - start] = end - begin
    return stop - start


@njit(nogil=True, cache=True)
def _ask(
    halves: Any, efficiencies: Any, depth: float, asked: int, state: Any, hits: Any, beyond: Any
) -> int:
    """Find the detected ones of the first ``asked`` genes; how many they are.

    In two loops without branches: compilers make vector instructions of the first.
    """
    for rank in range(asked):
        square = (1 + depth * halves[rank] * efficiencies[rank]) ** 2
        number = _uniform(state + GOLDEN * np.uint64(rank))
        beyond[rank] = number if number * square < square - 1 else 2.0
    end = 0
    for rank in range(asked):
        hits[end] = rank
        end += beyond[rank] < 1
    return end


@njit(nogil=True, cache=True)
def _search(
    halves: Any,
    efficiencies: Any,
    stretches: Any,
    depth: float,
    state: Any,
    end: int,
    hits: Any,
    beyond: Any,
) -> int:
    """Find the detected ones of the genes in these stretches; returns the new end of ``hits``."""
    waiting = -math.log(_uniform(state))
    for stretch in range(len(stretches) - 1):
        rank, stop = stretches[stretch], stretches[stretch + 1]
        most = depth * halves[rank]
        rate = 2 * math.log1p(most)  # of candidates, per rank
        share = most * (2 + most) / ((1 + most) * (1 + most))  # detected, of genes like the first
        while True:
            ahead = int(waiting / rate)
            if rank + ahead >= stop:  # what is left to wait is left to the next stretch
                waiting = max(waiting - rate * (stop - rank), 0.0)
                break
            rank += ahead
            x = depth * halves[rank] * efficiencies[rank]
            number = share * _uniform(state + GOLDEN)
            beyond[rank], hits[end] = number, rank
            end += number * (1 + x) * (1 + x) < x * (2 + x)
            state += GOLDEN * np.uint64(2)
            waiting = -math.log(_uniform(state))
            rank += 1
    return end


@njit(nogil=True, cache=True)
def _count(
    halves: Any,
    efficiencies: Any,
    columns: Any,
    depth: float,
    state: Any,
    hits: Any,
    beyond: Any,
    detected: Any,
    found: Any,
) -> None:
    """Give the detected genes their counts."""
    for rank in hits:
        x = depth * halves[rank] * efficiencies[rank]
        count = 0
        if x > INVERTED:
            while count == 0:  # at most one of 25 is
                count = _sum_of_geometric(x, state)
                state += GOLDEN * np.uint64(2)
        else:
            count = _invert(x, beyond[rank])
        column = columns[rank]
        detected[column >> 6] |= ONE << np.uint64(column & 63)
        found[column] = count


@njit(nogil=True, cache=True, inline="always")
def _uniform(state: Any) -> float:
    """Above 0 and below 1."""
    return (float(np.int64(hash_integer(state) >> np.uint64(11))) + 0.5) * 2.0**-53


@njit(nogil=True, cache=True)
def _depth(law: Any, log_length: float) -> float:
    """The depth at which so many genes are expected."""
    lengths, depths = law.log_lengths, law.log_depths
    log_length = min(max(log_length, lengths[0]), lengths[-1])
    above = min(max(int(np.searchsorted(lengths, log_length)), 1), len(lengths) - 1)
    part = (log_length - lengths[above - 1]) / (lengths[above] - lengths[above - 1])
    return math.exp(depths[above - 1] + part * (depths[above] - depths[above - 1]))


@njit(nogil=True, cache=True)
def _sum_of_geometric(x: float, state: Any) -> int:
    """A count with mean 2·x, by the next two random numbers."""
    log_miss = -math.log1p(1 / x)
    one, other = math.log(_uniform(state)), math.log(_uniform(state + GOLDEN))
    return int(one / log_miss) + int(other / log_miss)


@njit(nogil=True, cache=True)
def _invert(x: float, beyond: float) -> int:
    """The smallest count that is exceeded with a chance below ``beyond``; 1 at least.

    With q = x / (1 + x), the chance of more than k is q^(k + 1) · (1 + (k + 1) · (1 − q)).
    """
    miss = 1 / (1 + x)
    power = (1 - miss) * (1 - miss)
    count = 1
    while power * (1 + (count + 1) * miss) >= beyond:
        power *= 1 - miss
        count += 1
    return count


@njit(nogil=True, cache=True)
def _collect(detected: Any, found: Any, columns: Any, counts: Any, end: int) -> int:
    """Append what was detected, in the order of columns, and forget it; returns the new end."""
    for word in range(len(detected)):
        bits = detected[word]
        if bits:
            detected[word] = np.uint64(0)
            while bits:
                lowest = bits & (~bits + ONE)
                column = word * 64 + PLACES[(lowest * DE_BRUIJN) >> np.uint64(58)]
                columns[end], counts[end] = column, found[column]
                end += 1
                bits ^= lowest
    return end
