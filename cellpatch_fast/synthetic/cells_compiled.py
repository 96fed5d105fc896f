"""The compiled part of `datasets`: cells drawn one after the other, without the GIL.

A gene with mean 2·x has a count that is the sum of two geometric numbers, so it is detected with
chance 1 − 1 / (1 + x)². Genes are visited from the most common to the rarest. Common ones are asked
one by one. Rare ones would mostly be asked in vain: there, an exponential number says where the
next candidate is, as if all genes of a stretch were as common as its first, and the candidate is
accepted with the share to which it is rarer. What was found is sorted by column, in two digits.

Random numbers come from a cell's own sequences (SplitMix64), so it does not matter which cells are
drawn together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ..preprocessing.masking_compiled import hash_integer
from ..preprocessing.ordering import sort_by_digit

__all__ = ["Law", "draw_cells", "hash_seed"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
LOW = np.uint64(2**32 - 1)

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
    digit: int,  # bits, see `ordering`
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
    hits = np.empty(genes + 1, np.int64)  # ranks of detected genes
    beyond = np.empty(genes)  # [r]: what the count of a detected gene follows from
    is_marker = np.zeros(genes, np.bool_)  # [r]: whether it is a marker of the cell's type
    ranked = np.empty(genes, np.int32), np.empty(genes, np.float32)  # columns, counts; by rank
    half_sorted = np.empty(genes, np.int32), np.empty(genes, np.float32)
    places = np.empty(1 << digit, np.uint32)
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
        markers = law.markers[kind]
        is_marker[markers] = True
        state = hash_integer(state)
        number = _count(
            law.halves,
            efficiencies,
            law.columns,
            depth,
            state,
            hits[:number],
            beyond,
            is_marker,
            *ranked,
        )
        is_marker[markers] = False
        state = hash_integer(state)
        for rank in markers:
            x = depth * law.fold * law.halves[rank] * efficiencies[rank]
            count = _sum_of_geometric(x, state)
            state += GOLDEN * np.uint64(2)
            ranked[0][number], ranked[1][number] = law.columns[rank], count
            number += count > 0

        half = half_sorted[0][:number], half_sorted[1][:number]
        sort_by_digit(ranked[0][:number], ranked[1][:number], *half, places, 0)
        to = columns[end : end + number], counts[end : end + number]
        sort_by_digit(*half, *to, places, digit)
        types[cell - start], donors[cell - start], lengths[cell - start] = kind, donor, number
        end += number
    return stop - start


@njit(nogil=True, cache=True)
def _ask(
    halves: Any, efficiencies: Any, depth: float, asked: int, state: Any, hits: Any, beyond: Any
) -> int:
    """Find the detected ones of the first ``asked`` genes; how many they are.

    In loops without branches: compilers make vector instructions of the first. A random number has
    bits for two genes.
    """
    half = asked // 2
    for rank in range(half):
        number = hash_integer(state + GOLDEN * np.uint64(rank))
        one = (float(np.int64(number >> np.uint64(32))) + 0.5) * 2.0**-32
        square = (1 + depth * halves[rank] * efficiencies[rank]) ** 2
        beyond[rank] = one if one * square < square - 1 else 2.0
        other = (float(np.int64(number & LOW)) + 0.5) * 2.0**-32
        square = (1 + depth * halves[half + rank] * efficiencies[half + rank]) ** 2
        beyond[half + rank] = other if other * square < square - 1 else 2.0
    if asked % 2:
        one = _uniform(state - GOLDEN)
        square = (1 + depth * halves[asked - 1] * efficiencies[asked - 1]) ** 2
        beyond[asked - 1] = one if one * square < square - 1 else 2.0
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
    is_marker: Any,
    found_columns: Any,
    found_counts: Any,
) -> int:
    """Give detected genes their counts, but for ``own`` ones; returns how many were found."""
    end = 0
    for rank in hits:
        x = depth * halves[rank] * efficiencies[rank]
        count = 0
        if x > INVERTED:
            while count == 0:  # at most one of 25 is
                count = _sum_of_geometric(x, state)
                state += GOLDEN * np.uint64(2)
        else:
            count = _invert(x, beyond[rank])
        found_columns[end], found_counts[end] = columns[rank], count
        end += not is_marker[rank]
    return end


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
    hit = 1 - miss
    power = hit * hit
    count = 1
    for k in range(2, 5):  # most counts; without branches, which could not be foreseen
        count += power * (1 + k * miss) >= beyond
        power *= hit
    if count == 4:
        while power * (1 + (count + 1) * miss) >= beyond:
            power *= hit
            count += 1
    return count
