"""Attention of one head's queries over one cell, forward and backward: what `ragged` runs.

Work is done in tiles of `TILE` entries by at most `BLOCK` queries, vectors along the queries, and
what a tile needs stays in the first-level cache (weights and their gradients take 8 KiB each).

- Scores are summed in float64 and rounded after the reference of their query (the largest score
  so far; backward the log-sum-exp) is taken off: a score of 100 summed in float32 is off by 1e-5,
  and so were its exponential. Bias and reference are two more columns of the product: an entry
  is [key, bias, 1] and a query [scale · query, 1, -reference].
  A log-sum-exp comes in float32, and its own rounding, 4e-6 at 100, is an error of all weights.
- The reference moves when a score exceeds it by `LEEWAY`, not with every new maximum; then the
  tile's scores are made again and the sums so far are scaled. Most cells do so once or twice.
- Sums over entries: a tile is summed from zero, tiles are added up to chunks of `CHUNK` entries,
  chunks to the whole, so that no chain of roundings is longer than 32 + 32 + n / 1024.

Operations per entry, head and 16 queries, forward: 2 (d + 2) multiply-adds of 8 doubles for the
score, 22 for the exponential, d for the sum. Backward: 2 (d + 2) and 22 again, then 4 d.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from .dropout import Dropout, begin_words, differentiate_scores, drop_weights, make_words
from .simd import LANES, aligned, multiply_add, multiply_exactly
from .vector_math import (
    add,
    exp_difference,
    exponentials,
    fill,
    larger,
    multiply,
)

F32 = np.float32

TILE = 32  # entries
BLOCK = 64  # queries
CHUNK = 1024  # entries
AFFINE, BINNED = 1, 2  # parts of keys and values: times an amount, or a row for each
LEEWAY = F32(8.0)  # e^8 is 3,000: far from overflow, and no precision is lost


class Cells(NamedTuple):
    """A problem in float32, as compiled code sees it; what is not given is empty."""

    query: np.ndarray  # float32 [1 or c · q · h · d]
    key: np.ndarray  # float32 [r · h · d]
    value: np.ndarray  # float32 [r · h · d]
    offsets: np.ndarray  # int64 [c + 1]
    ids: np.ndarray  # int64 [n]
    amounts: np.ndarray  # float32 [n]
    key_part: np.ndarray  # float32 [1 or bins · h · d]
    value_part: np.ndarray  # float32 [1 or bins · h · d]
    bias: np.ndarray  # float32 [n · h]
    shared: bool  # the same queries for all cells
    looked_up: bool  # there are ids
    parts: int  # 0 for none, else AFFINE or BINNED
    biased: bool
    queries: int
    heads: int
    head_dim: int
    scale: float
    dropout: Dropout
    numbers: np.ndarray  # int64 [c]: of cells in their batch, by which weights are dropped


class Scratch(NamedTuple):
    """Memory of one thread. ``width`` is head_dim rounded up to whole vectors."""

    keys: np.ndarray  # float64 [TILE · (d + 2)]: key, bias, 1
    values: np.ndarray  # float32 [TILE · d]
    exact_queries: np.ndarray  # float64 [(d + 2) · BLOCK]: query, 1, -reference
    weights: np.ndarray  # float32 [TILE · BLOCK]
    kept: np.ndarray  # float32 [TILE · BLOCK]: weights that are not dropped, times a factor
    words: np.ndarray  # int64: of `dropout`
    partial: np.ndarray  # float32 [(d + 1) · BLOCK]: sums of the chunk, the last of weights
    sums: np.ndarray  # float32 [(d + 1) · BLOCK]
    # forward
    highest: np.ndarray  # float32 [BLOCK]: of the tile's scores
    limit: np.ndarray  # float32 [BLOCK]: what they may be without a new reference
    reference: np.ndarray  # float32 [BLOCK]
    before: np.ndarray  # float32 [BLOCK]: the reference
    # backward
    plain_keys: np.ndarray  # float32 [TILE · d]
    queries: np.ndarray  # float32 [BLOCK · width]: times scale
    gradient: np.ndarray  # float32 [BLOCK · width]
    turned: np.ndarray  # float32 [d · BLOCK]: the gradient, transposed
    delta: np.ndarray  # float32 [BLOCK]
    products: np.ndarray  # float32 [TILE · BLOCK]: gradient · value, then gradients of scores
    rows: np.ndarray  # float32 [TILE · width]: gradients of keys or values


def make_scratch(head_dim: int) -> Scratch:
    width = -(-head_dim // LANES) * LANES
    return Scratch(
        keys=np.zeros(TILE * (head_dim + 2)),
        values=aligned(TILE * head_dim),
        exact_queries=np.zeros((head_dim + 2) * BLOCK),
        weights=aligned(TILE * BLOCK),
        kept=aligned(TILE * BLOCK),
        words=make_words(BLOCK),
        partial=aligned((head_dim + 1) * BLOCK),
        sums=aligned((head_dim + 1) * BLOCK),
        highest=aligned(BLOCK),
        limit=aligned(BLOCK),
        reference=aligned(BLOCK),
        before=aligned(BLOCK),
        plain_keys=aligned(TILE * head_dim),
        queries=aligned(BLOCK * width),
        gradient=aligned(BLOCK * width),
        turned=aligned(head_dim * BLOCK),
        delta=aligned(BLOCK),
        products=aligned(TILE * BLOCK),
        rows=aligned(TILE * width),
    )


@njit(nogil=True)
def attend(cells, cell, h, first_query, output, log_sum_exp, s):
    """Up to `BLOCK` queries of a head over a cell: writes output [c, q, h, d] and lse [c, h, q]."""
    first, last = cells.offsets[cell], cells.offsets[cell + 1]
    d = cells.head_dim
    count = min(BLOCK, cells.queries - first_query)
    lanes = (count + LANES - 1) // LANES * LANES
    _stage_queries(cells, cell, h, first_query, count, lanes, s)
    size = (d + 1) * lanes
    fill((F32(0.0),), s.partial, 0, s.partial, 0, size)
    fill((F32(0.0),), s.sums, 0, s.sums, 0, size)
    fill((F32(-np.inf),), s.limit, 0, s.limit, 0, lanes)  # any score exceeds it
    fill((F32(0.0),), s.reference, 0, s.reference, 0, lanes)
    _begin_words(cells, cell, h, first_query, lanes, s)
    for start in range(first, last, TILE):
        entries = min(TILE, last - start)
        _stage_entries(cells, h, start, entries, s)
        _score(d, entries, lanes, s)
        if _exceeded(entries, lanes, s):
            _move_reference(d, lanes, s)
            _score(d, entries, lanes, s)
        exponentials((), s.weights, 0, s.weights, 0, entries * lanes)
        fill((F32(0.0),), s.highest, 0, s.highest, 0, lanes)  # now the tile's total
        for k in range(entries):
            add((), s.highest, 0, s.highest, 0, s.weights, k * lanes, lanes)
        add((), s.partial, d * lanes, s.partial, d * lanes, s.highest, 0, lanes)
        if cells.dropout.threshold > 0:
            _drop(s.weights, cells, start - first, entries, lanes, s)
        multiply_add(s.partial, 0, lanes, d, lanes, s.values, 0, 1, d, s.weights, 0, lanes, entries)
        if (start + TILE - first) % CHUNK == 0:
            _end_chunk(size, s)
    _end_chunk(size, s)
    for j in range(count):
        total = s.sums[d * lanes + j]
        inverse = F32(0.0) if total == 0 else F32(1.0) / total
        place = ((cell * cells.queries + first_query + j) * cells.heads + h) * d
        for i in range(d):
            output[place + i] = s.sums[i * lanes + j] * inverse
        place = (cell * cells.heads + h) * cells.queries + first_query + j
        log_sum_exp[place] = F32(-np.inf)
        if total != 0:
            log_sum_exp[place] = F32(s.reference[j] + math.log(np.float64(total)))


@njit(nogil=True)
def differentiate(
    cells, cell, h, first_row, gradient, delta, log_sum_exp,
    query_gradient, query_row, key_gradient, value_gradient, bias_gradient, s,
):  # fmt: skip
    """All gradients of one head of one cell.

    Parameters
    ----------
    gradient, delta, log_sum_exp
        float32 [c, q, h, d], [c, h, q], [c, h, q].
    query_gradient, query_row
        float32 [·, q, h, d], of which row ``query_row`` is written.
    key_gradient, value_gradient, first_row
        float32 [·, h, d] of entries, beginning with entry ``first_row``.
    bias_gradient
        float32 [n, h], of zeros; added to where there is a bias.
    """
    first, last, d = cells.offsets[cell], cells.offsets[cell + 1], cells.head_dim
    stride = cells.heads * d
    for first_query in range(0, cells.queries, BLOCK):
        count = min(BLOCK, cells.queries - first_query)
        lanes = (count + LANES - 1) // LANES * LANES
        _stage_queries(cells, cell, h, first_query, count, lanes, s)
        _stage_gradient(cells, cell, h, first_query, count, lanes, gradient, delta, log_sum_exp, s)
        fill((F32(0.0),), s.partial, 0, s.partial, 0, d * lanes)
        fill((F32(0.0),), s.sums, 0, s.sums, 0, d * lanes)
        _begin_words(cells, cell, h, first_query, lanes, s)
        for start in range(first, last, TILE):
            entries = min(TILE, last - start)
            _stage_entries(cells, h, start, entries, s)
            _score(d, entries, lanes, s)
            exponentials((), s.weights, 0, s.weights, 0, entries * lanes)
            fill((F32(0.0),), s.products, 0, s.products, 0, entries * lanes)
            multiply_add(
                s.products, 0, lanes, entries, lanes, s.values, 0, d, 1, s.turned, 0, lanes, d
            )
            kept = s.weights
            if cells.dropout.threshold > 0:
                kept = s.kept
                _drop(kept, cells, start - first, entries, lanes, s)
            differentiate_scores(
                s.products, s.weights, kept, s.delta, 0, entries, lanes, cells.dropout
            )
            place = ((start - first_row) * cells.heads + h) * d
            more = first_query > 0
            _write_rows(
                value_gradient, place, stride, more, entries, d, kept, lanes, s.gradient, count, s
            )
            _write_rows(
                key_gradient, place, stride, more, entries, d, s.products, lanes, s.queries, count,
                s,
            )  # fmt: skip
            if cells.biased:
                for k in range(entries):
                    total = 0.0
                    for j in range(count):
                        total += s.products[k * lanes + j]
                    bias_gradient[(start + k) * cells.heads + h] += F32(total)
            multiply_add(
                s.partial, 0, lanes, d, lanes, s.plain_keys, 0, 1, d, s.products, 0, lanes, entries
            )
            if (start + TILE - first) % CHUNK == 0:
                _end_chunk(d * lanes, s)
        _end_chunk(d * lanes, s)
        for j in range(count):
            place = ((query_row * cells.queries + first_query + j) * cells.heads + h) * d
            for i in range(d):
                query_gradient[place + i] = s.sums[i * lanes + j] * F32(cells.scale)


@njit(nogil=True)
def _stage_queries(cells, cell, h, first_query, count, lanes, s):
    """exact_queries = [scale · query, 1, 0], one column for each query; zeros in other columns."""
    d, row = cells.head_dim, cells.heads * cells.head_dim
    source = (0 if cells.shared else cell * cells.queries) * row + first_query * row + h * d
    for i in range(d):
        for j in range(count):
            query = np.float64(cells.query[source + j * row + i])
            s.exact_queries[i * lanes + j] = query * cells.scale
        for j in range(count, lanes):
            s.exact_queries[i * lanes + j] = 0.0
    for j in range(lanes):
        s.exact_queries[d * lanes + j] = 1.0
        s.exact_queries[(d + 1) * lanes + j] = 0.0


@njit(nogil=True)
def _stage_gradient(cells, cell, h, first_query, count, lanes, gradient, delta, log_sum_exp, s):
    """What the backward needs of each query besides; the reference is its log-sum-exp."""
    d, row = cells.head_dim, cells.heads * cells.head_dim
    width = (d + LANES - 1) // LANES * LANES
    source = (cell * cells.queries + first_query) * row + h * d
    fill((F32(0.0),), s.turned, 0, s.turned, 0, d * lanes)
    fill((F32(0.0),), s.delta, 0, s.delta, 0, lanes)
    for j in range(count):
        for i in range(d):
            s.gradient[j * width + i] = gradient[source + j * row + i]
            s.turned[i * lanes + j] = gradient[source + j * row + i]
            s.queries[j * width + i] = F32(s.exact_queries[i * lanes + j])
        place = (cell * cells.heads + h) * cells.queries + first_query + j
        s.delta[j] = delta[place]
        if log_sum_exp[place] > F32(-np.inf):  # else all biases are -inf, and all weights 0
            s.exact_queries[(d + 1) * lanes + j] = -np.float64(log_sum_exp[place])


@njit(nogil=True)
def _stage_entries(cells, h, start, entries, s):
    """keys = [key, bias, 1], plain_keys = key, and values, of ``entries`` entries."""
    d, row = cells.head_dim, cells.heads * cells.head_dim
    for k in range(entries):
        entry = start + k
        source = (cells.ids[entry] if cells.looked_up else entry) * row + h * d
        part, amount = h * d, F32(0.0)
        if cells.parts == AFFINE:
            amount = cells.amounts[entry]
        elif cells.parts == BINNED:
            part, amount = np.int64(cells.amounts[entry]) * row + h * d, F32(1.0)
        for i in range(d):
            key, value = np.float64(cells.key[source + i]), cells.value[source + i]
            if cells.parts > 0:
                key += np.float64(amount) * np.float64(cells.key_part[part + i])
                value += amount * cells.value_part[part + i]
            s.keys[k * (d + 2) + i] = key
            s.plain_keys[k * d + i] = F32(key)
            s.values[k * d + i] = value
        bias = np.float64(cells.bias[entry * cells.heads + h]) if cells.biased else 0.0
        s.keys[k * (d + 2) + d] = bias
        s.keys[k * (d + 2) + d + 1] = 1.0


@njit(nogil=True, inline="always")
def _score(d, entries, lanes, s):
    """weights = scores relative to the references."""
    multiply_exactly(
        s.weights, 0, lanes, entries, lanes, s.keys, 0, d + 2, s.exact_queries, 0, lanes, d + 2
    )


@njit(nogil=True)
def _exceeded(entries, lanes, s):
    """Whether a score of the tile asks for a new reference; highest = the largest scores."""
    fill((F32(-np.inf),), s.highest, 0, s.highest, 0, lanes)
    for k in range(entries):
        larger((), s.highest, 0, s.weights, k * lanes, s.highest, 0, lanes)
    exceeded = False
    for j in range(lanes):
        exceeded |= s.highest[j] > s.limit[j]
    return exceeded


@njit(nogil=True)
def _move_reference(d, lanes, s):
    """Make the largest score the reference where it exceeds its limit, and scale the sums."""
    for j in range(lanes):
        s.before[j] = s.reference[j]
        if s.highest[j] > s.limit[j]:
            s.reference[j] += s.highest[j]
            if s.limit[j] < 0:  # there are no sums yet
                s.before[j] = s.reference[j]
            s.limit[j] = LEEWAY
            s.exact_queries[(d + 1) * lanes + j] = -np.float64(s.reference[j])
    exp_difference((F32(1.0),), s.before, 0, s.before, 0, s.reference, 0, lanes)
    for i in range(d + 1):
        multiply((), s.partial, i * lanes, s.partial, i * lanes, s.before, 0, lanes)
        multiply((), s.sums, i * lanes, s.sums, i * lanes, s.before, 0, lanes)


@njit(nogil=True, inline="always")
def _begin_words(cells, cell, h, first_query, lanes, s):
    if cells.dropout.threshold > 0:
        number = cells.numbers[cell]
        begin_words(s.words, 0, cells.dropout, number, h, first_query, cells.queries, lanes)


@njit(nogil=True, inline="always")
def _drop(out, cells, first, entries, lanes, s):
    """out = weights / (1 - dropout), or 0 where they are dropped."""
    for k in range(entries):
        at = k * lanes
        drop_weights(out, at, s.weights, at, s.words, 0, first + k, lanes, cells.dropout)


@njit(nogil=True, inline="always")
def _end_chunk(size, s):
    """Add the chunk in work to the sums."""
    add((), s.sums, 0, s.sums, 0, s.partial, 0, size)
    fill((F32(0.0),), s.partial, 0, s.partial, 0, size)


@njit(nogil=True)
def _write_rows(target, place, stride, more, entries, d, factors, lanes, rows, count, s):
    """target[k, :d] = factors[k] · rows, a sum over ``count`` queries; added if ``more``."""
    width = (d + LANES - 1) // LANES * LANES
    fill((F32(0.0),), s.rows, 0, s.rows, 0, entries * width)
    multiply_add(s.rows, 0, width, entries, width, factors, 0, lanes, 1, rows, 0, width, count)
    for k in range(entries):
        for i in range(d):
            before = target[place + k * stride + i] if more else F32(0.0)
            target[place + k * stride + i] = before + s.rows[k * width + i]
