"""Gradients of shared queries over tables, range of rows by range: what the backward runs.

See `ragged_tables_backward` for the order of work and its reasons. A (range, head) is opened,
passed over by all cells in tiles of `TILE` entries, and closed:

- open: factors of its rows are made from keys and queries, its value rows copied, sums cleared;
- pass: weights and gradients of scores of a tile are made and added to the sums of their rows;
- close: sums become gradients of keys (with the queries) and of queries (with the keys).

A row's sums are float32 for about `ROW_CHUNK` entries and float64 beyond, so that a row of which a
cell has 20,000 entries, all of them alike, is right to 1e-6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .compiled import digest
from .dropout import Dropout, begin_words, differentiate_scores, drop_weights, make_words
from .ragged_tables import ROWS, Scores, make_powers
from .simd import aligned, borrow, multiply_add
from .vector_math import add, add_scaled, fill, multiply, value_factors

F32 = np.float32

TILE = 30  # entries: five register tiles; weights and gradients of scores take 8 KiB each
CHUNK = 1024  # entries
ROW_CHUNK = 16  # entries of each of a range's rows, on average


class States(NamedTuple):
    """What is known of cells before their entries are passed over; of each (cell, head)."""

    turned: np.ndarray  # float32 [c · h · d · lanes]: gradient of the output
    straight: np.ndarray  # float32 [c · h · q · width]: the same
    delta: np.ndarray  # float32 [c · h · lanes]
    inverse: np.ndarray  # float32 [c · h · lanes]: 1 / total of the weights
    shift: np.ndarray  # float32 [c · h · lanes]: of the factors of amounts
    lost: np.ndarray  # uint8 [c]


class Ranges(NamedTuple):
    """Rows in ranges, and entries in the order of (range, cell)."""

    number: int
    cells: int
    first_cell: int  # its number in the batch
    rows: np.ndarray  # int64 [rows that occur]: most frequent first
    bounds: np.ndarray  # int64 [ranges + 1]: of rows
    starts: np.ndarray  # int64 [ranges · c + 1]: of entries
    ranks: np.ndarray  # int32 [n]: of the row, within the range
    places: np.ndarray  # int32 [n]: within the cell
    amounts: np.ndarray  # float32 [n]


class Task(NamedTuple):
    """What is the same for all cells, and the gradients of the tables."""

    queries: int
    width: int  # head_dim, rounded up to whole vectors
    bins: int  # rows of parts: 1 if affine
    discrete: bool  # amounts are small integers, whose factors are made once for a visit
    dropout: Dropout
    values: np.ndarray  # float32 [r · h · d]
    value_part: np.ndarray  # float32 [bins · h · width]
    plain_queries: np.ndarray  # float32 [h · q · width]: times scale
    key_gradient: np.ndarray  # float32 [r · h · d]: added to
    value_gradient: np.ndarray  # float32 [r · h · d]: added to


class Sums(NamedTuple):
    """What each range adds to gradients that all have in common."""

    query: np.ndarray  # float64 [ranges · h · d · lanes]: of keys times gradients of scores
    scores: np.ndarray  # float64 [ranges · h · bins · lanes]: of these times amounts
    values: np.ndarray  # float64 [ranges · h · bins · width]: of gradients of values, likewise


class Scratch(NamedTuple):
    """Memory of one thread, for one range and head."""

    factors: np.ndarray  # float32 [rows · lanes]: of rows of the table
    scores: np.ndarray  # float32 [rows · lanes]: sums of gradients
    values: np.ndarray  # float32 [rows · width]
    value_gradients: np.ndarray  # float32 [rows · width]
    score_totals: np.ndarray  # float64 [rows · lanes]: of the chunks before
    value_totals: np.ndarray  # float64 [rows · width]
    amount_factors: np.ndarray  # float32 [bins or 256 · lanes]
    made: np.ndarray  # int64 [bins or 256]: the cell whose amount_factors these are
    score_part: np.ndarray  # float32 [bins · lanes]: sums of the chunk
    value_part: np.ndarray  # float32 [bins · width]
    # of a tile
    weights: np.ndarray  # float32 [TILE · lanes]
    products: np.ndarray  # float32 [TILE · lanes]
    entry_values: np.ndarray  # float32 [TILE · width]
    kept: np.ndarray  # float32 [TILE · lanes]: weights that are not dropped, times a factor
    words: np.ndarray  # int64: of `dropout`
    rows: np.ndarray  # float32 [ROWS · width]
    query_sums: np.ndarray  # float32 [d · lanes]
    # of `make_powers`
    keys: np.ndarray  # float64 [ROWS · d]
    powers: np.ndarray  # float32 [ROWS · lanes]


def make_scratch(scores: Scores, task: Task, ranges: Ranges) -> Scratch:
    lanes, width = scores.lanes, task.width
    rows = int(np.diff(ranges.bounds).max())
    kinds = task.bins if scores.binned else 256
    return Scratch(
        factors=aligned(rows * lanes),
        scores=aligned(rows * lanes),
        values=aligned(rows * width),
        value_gradients=aligned(rows * width),
        score_totals=np.empty(rows * lanes),
        value_totals=np.empty(rows * width),
        amount_factors=aligned(kinds * lanes),
        made=np.empty(kinds, np.int64),
        score_part=aligned(task.bins * lanes),
        value_part=aligned(task.bins * width),
        weights=aligned(TILE * lanes),
        products=aligned(TILE * lanes),
        entry_values=aligned(TILE * width),
        kept=aligned(TILE * lanes),
        words=make_words(lanes),
        rows=aligned(ROWS * width),
        query_sums=aligned(scores.head_dim * lanes),
        keys=np.zeros(ROWS * scores.head_dim),
        powers=aligned(ROWS * lanes),
    )


@njit(nogil=True)
def _open_range(task, scores, ranges, range_, h, s):
    """Copy a range's rows, and clear its sums."""
    first, d, lanes, width = ranges.bounds[range_], scores.head_dim, scores.lanes, task.width
    rows = ranges.bounds[range_ + 1] - first
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        make_powers(
            s.factors, start * lanes, lanes, scores, ranges.rows, first + start, count, h, s
        )
    for r in range(rows):
        source = (ranges.rows[first + r] * scores.heads + h) * d
        for i in range(d):
            s.values[r * width + i] = task.values[source + i]
    zero = (F32(0.0),)
    fill(zero, s.scores, 0, s.scores, 0, rows * lanes)
    fill(zero, s.value_gradients, 0, s.value_gradients, 0, rows * width)
    fill(zero, s.score_part, 0, s.score_part, 0, task.bins * lanes)
    fill(zero, s.value_part, 0, s.value_part, 0, task.bins * width)


@njit(nogil=True, inline="always")
def _factor_row(amount, cell, at, h, task, scores, states, s):
    """Row of amount_factors that holds 2^(score of the amount) / total, made now if need be."""
    lanes = scores.lanes
    row = np.int64(amount) if task.discrete or scores.binned else 0
    if s.made[row] == cell and (task.discrete or scores.binned):
        return row
    s.made[row] = cell
    place = row * lanes
    if scores.binned:
        source = (row * scores.heads + h) * lanes
        multiply((), s.amount_factors, place, scores.factors, source, states.inverse, at, lanes)
    else:
        value_factors(
            (amount,), s.amount_factors, place, scores.slope, h * lanes,
            scores.slope_rest, h * lanes, states.shift, at, lanes,
        )  # fmt: skip
        multiply((), s.amount_factors, place, s.amount_factors, place, states.inverse, at, lanes)
    return row


@njit(nogil=True)
def _pass_tile(start, count, cell, h, task, scores, states, ranges, s):
    """Add what ``count`` entries of a cell give to the sums of a range."""
    d, lanes, width = scores.head_dim, scores.lanes, task.width
    at = (cell * scores.heads + h) * lanes
    for k in range(count):
        rank, amount = np.int64(ranges.ranks[start + k]), ranges.amounts[start + k]
        row = _factor_row(amount, cell, at, h, task, scores, states, s)
        multiply(
            (), s.weights, k * lanes, s.factors, rank * lanes, s.amount_factors, row * lanes, lanes
        )
        if scores.binned:
            part = (row * scores.heads + h) * width
            add((), s.entry_values, k * width, s.values, rank * width, task.value_part, part, width)
        else:
            add_scaled(
                (amount,), s.entry_values, k * width, task.value_part, h * width,
                s.values, rank * width, width,
            )  # fmt: skip
    fill((F32(0.0),), s.products, 0, s.products, 0, count * lanes)
    multiply_add(
        s.products, 0, lanes, count, lanes,
        s.entry_values, 0, width, 1, states.turned, at * d, lanes, d,
    )  # fmt: skip
    kept = s.weights
    if task.dropout.threshold > 0:
        kept = s.kept
        for k in range(count):
            drop_weights(
                s.kept, k * lanes, s.weights, k * lanes,
                s.words, 0, np.int64(ranges.places[start + k]), lanes, task.dropout,
            )  # fmt: skip
    fill((F32(0.0),), s.rows, 0, s.rows, 0, count * width)
    multiply_add(
        s.rows, 0, width, count, width, kept, 0, lanes, 1,
        states.straight, (cell * scores.heads + h) * task.queries * width, width, task.queries,
    )  # fmt: skip
    differentiate_scores(s.products, s.weights, kept, states.delta, at, count, lanes, task.dropout)
    for k in range(count):
        rank, amount = np.int64(ranges.ranks[start + k]), ranges.amounts[start + k]
        add((), s.scores, rank * lanes, s.scores, rank * lanes, s.products, k * lanes, lanes)
        place = rank * width
        add((), s.value_gradients, place, s.value_gradients, place, s.rows, k * width, width)
        row = 0
        if scores.binned:
            row, amount = np.int64(amount), F32(1.0)
        place = row * lanes
        add_scaled(
            (amount,), s.score_part, place, s.products, k * lanes, s.score_part, place, lanes
        )
        place = row * width
        add_scaled((amount,), s.value_part, place, s.rows, k * width, s.value_part, place, width)


@njit(nogil=True)
def _end_chunk(task, scores, sums, range_, h, s):
    """Add the amounts' part of the chunk to the range's sums."""
    at = range_ * scores.heads + h
    for part, total, size in (
        (s.score_part, sums.scores, task.bins * scores.lanes),
        (s.value_part, sums.values, task.bins * task.width),
    ):
        for j in range(size):
            total[at * size + j] += np.float64(part[j])
        fill((F32(0.0),), part, 0, part, 0, size)


@njit(nogil=True)
def _end_row_chunk(rows, lanes, width, begun, s):
    """Add the rows' sums to their totals, which have ``begun`` or begin with them."""
    for sums, totals, size in (
        (s.scores, s.score_totals, rows * lanes),
        (s.value_gradients, s.value_totals, rows * width),
    ):
        for j in range(size):
            totals[j] = (totals[j] if begun else 0.0) + np.float64(sums[j])
            sums[j] = F32(0.0)


@njit(nogil=True)
def _end_rows(rows, lanes, width, s):
    """Leave the totals where the sums were."""
    _end_row_chunk(rows, lanes, width, True, s)
    for j in range(rows * lanes):
        s.scores[j] = F32(s.score_totals[j])
    for j in range(rows * width):
        s.value_gradients[j] = F32(s.value_totals[j])


@njit(nogil=True)
def _close_range(task, scores, ranges, sums, range_, h, s):
    """Add the gradients of a range's rows, and what it gives to those of the queries."""
    first, d, lanes, width = ranges.bounds[range_], scores.head_dim, scores.lanes, task.width
    rows = ranges.bounds[range_ + 1] - first
    fill((F32(0.0),), s.query_sums, 0, s.query_sums, 0, d * lanes)
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        fill((F32(0.0),), s.rows, 0, s.rows, 0, count * width)
        multiply_add(
            s.rows, 0, width, count, width, s.scores, start * lanes, lanes, 1,
            task.plain_queries, h * task.queries * width, width, task.queries,
        )  # fmt: skip
        for k in range(count):
            place = (ranges.rows[first + start + k] * scores.heads + h) * d
            for i in range(d):
                task.key_gradient[place + i] += s.rows[k * width + i]
                task.value_gradient[place + i] += s.value_gradients[(start + k) * width + i]
                s.rows[k * width + i] = scores.keys[place + i]
        multiply_add(
            s.query_sums, 0, lanes, d, lanes, s.rows, 0, 1, width,
            s.scores, start * lanes, lanes, count,
        )  # fmt: skip
    at = (range_ * scores.heads + h) * d * lanes
    for j in range(d * lanes):
        sums.query[at + j] = np.float64(s.query_sums[j])


def _compiled(sources: str) -> Any:
    """The compiled function that is kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def differentiate_ranges(task_, scores_, states_, ranges_, sums_, scratch_, start, stop):
        if len(sources):
            task, scores, states = borrow(task_), borrow(scores_), borrow(states_)
            ranges, sums, s = borrow(ranges_), borrow(sums_), borrow(scratch_)
            for item in range(start, stop):
                range_, h = item // scores.heads, item % scores.heads
                _open_range(task, scores, ranges, range_, h, s)
                scratch_.made[:] = -1
                rows = ranges.bounds[range_ + 1] - ranges.bounds[range_]
                chunk, row_chunk, begun = 0, 0, False
                for cell in range(ranges.cells):
                    place = range_ * ranges.cells + cell
                    first, last = ranges.starts[place], ranges.starts[place + 1]
                    if task.dropout.threshold > 0 and first < last:
                        begin_words(
                            s.words, 0, task.dropout, ranges.first_cell + cell, h,
                            0, task.queries, scores.lanes,
                        )  # fmt: skip
                    for at in range(first, last, TILE):
                        count = min(TILE, last - at)
                        _pass_tile(at, count, cell, h, task, scores, states, ranges, s)
                        chunk += count
                        row_chunk += count
                        if chunk >= CHUNK:
                            _end_chunk(task, scores, sums, range_, h, s)
                            chunk = 0
                        if row_chunk >= ROW_CHUNK * rows:
                            _end_row_chunk(rows, scores.lanes, task.width, begun, s)
                            row_chunk, begun = 0, True
                _end_chunk(task, scores, sums, range_, h, s)
                if begun:
                    _end_rows(rows, scores.lanes, task.width, s)
                _close_range(task, scores, ranges, sums, range_, h, s)

    return differentiate_ranges


differentiate = _compiled(digest())
