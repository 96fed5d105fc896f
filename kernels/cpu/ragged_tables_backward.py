"""Ragged attention of shared queries over tables: the backward.

As queries are the same for all cells, gradients of keys need no product per entry: gradients of
scores [q] are summed for each row of the table, and one product with the queries (for the keys),
or with the keys (for the queries), ends the call. Per entry, and 16 queries of a head, remain

    2 to make the weight again: the factors of row and amount, and 1 / total, see `ragged_tables`
    d to multiply the value row with the output's gradient, and 2 for the gradient of the score
    d to multiply the weights with the output's gradient, for the value row
    2 to add to the row's sums of scores; 1 for the amount's

multiplications or additions: 312 vectors of them at the paper's sizes, against the forward's 152.

Memory decides how they are ordered. A row has factors and sums of 512 bytes and a value row and its
gradient of 128 each. So rows are shared out in *ranges*, (range, head) by (range, head), and a
thread copies what belongs to a range to its own memory, passes over all cells, and writes the
range's gradients: no two threads write to the same row, a row's sums are in the order of cells
and entries, and what is in work lies in the second-level cache. Rows are ranked by how often they
occur: a few hundred rows make up the first ranges, of which every cell has many, and rows that
occur once come last, when their memory has to be fetched in any case. Entries are sorted by range
beforehand (by counting, 8 bytes each); a range has on average `VISIT` entries of a cell, whose
state takes 9 KiB per head.

Sums over all rows or entries (queries, parts) are summed for each range, in float32 up to `CHUNK`
entries and in float64 beyond, and the ranges in their order. Nothing depends on the number of
threads.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..ragged import Gradients, RaggedAttention
from ..threads import run_blocks
from .attention import LARGEST_EXPONENT, SCALE
from .compiled import announce_compilation, digest
from .ragged_tables import (
    LARGEST,
    ROWS,
    SMALLEST,
    Scores,
    amounts_of,
    make_powers,
    make_scores,
)
from .simd import LANES, aligned, borrow, multiply_add
from .vector_math import add, add_scaled, fill, multiply, scale, value_factors

F32 = np.float32

TILE = 30  # entries: five register tiles; weights and gradients of scores take 8 KiB each
VISIT = 100  # entries of a cell in a range of rows, on average
MOST_ROWS = 2048  # of a range: 1.3 MB, and 64 queries
ALIKE = 8  # times as often as a range's last row may its first one occur
CHUNK = 1024  # entries
ROW_CHUNK = 16  # entries of each of a range's rows, on average
MOST_CELLS = 1024  # of a call of compiled code: their state takes 18 MB, and 64 queries


class States(NamedTuple):
    """What is known of cells before their entries are passed over; of each (cell, head)."""

    turned: np.ndarray  # float32 [c · h · d · lanes]: gradient of the output
    straight: np.ndarray  # float32 [c · h · q · width]: the same
    delta: np.ndarray  # float32 [c · h · lanes]: negative
    inverse: np.ndarray  # float32 [c · h · lanes]: 1 / total of the weights
    shift: np.ndarray  # float32 [c · h · lanes]: of the factors of amounts
    lost: np.ndarray  # uint8 [c]


class Ranges(NamedTuple):
    """Rows in ranges, and entries in the order of (range, cell)."""

    number: int
    cells: int
    rows: np.ndarray  # int64 [rows that occur]: most frequent first
    bounds: np.ndarray  # int64 [ranges + 1]: of rows
    starts: np.ndarray  # int64 [ranges · c + 1]: of entries
    ranks: np.ndarray  # int32 [n]: of the row, within the range
    amounts: np.ndarray  # float32 [n]


class Task(NamedTuple):
    """What else the backward reads, and what it writes."""

    queries: int
    width: int  # head_dim, rounded up to whole vectors
    bins: int  # rows of parts: 1 if affine
    discrete: bool  # amounts are small integers, whose factors are made once for a visit
    values: np.ndarray  # float32 [r · h · d]
    value_part: np.ndarray  # float32 [bins · h · width]
    plain_queries: np.ndarray  # float32 [h · q · width]: times scale
    key_gradient: np.ndarray  # float32 [r · h · d]
    value_gradient: np.ndarray  # float32 [r · h · d]
    query_sums: np.ndarray  # float64 [ranges · h · d · lanes]
    score_sums: np.ndarray  # float64 [ranges · h · bins · lanes]: of gradients times amounts
    value_sums: np.ndarray  # float64 [ranges · h · bins · width]: likewise


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
    rows: np.ndarray  # float32 [ROWS · width]
    query_sums: np.ndarray  # float32 [d · lanes]
    # of `make_powers`
    keys: np.ndarray  # float64 [ROWS · d]
    powers: np.ndarray  # float32 [ROWS · lanes]


def backward(
    problem: RaggedAttention, gradient: Tensor, delta: Tensor, log_sum_exp: Tensor
) -> tuple[Gradients, np.ndarray]:
    """Gradients of all cells but those that are lost, and which these are: bool [c].

    At most `MOST_CELLS` cells; ``problem`` is of float32, and `ragged_tables.suits`.
    """
    assert problem.ids is not None
    scores = make_scores(problem)
    ids, amounts = problem.ids.numpy(), amounts_of(problem)
    repeats = np.bincount(ids, minlength=len(problem.key))
    states = _make_states(problem, scores, amounts, gradient, delta, log_sum_exp)
    ranges = _sort_entries(problem.offsets.numpy(), ids, amounts, repeats, states)
    task = _make_task(problem, scores, ranges)
    announce_compilation(_differentiate_ranges, 20)
    own = threading.local()  # a thread's scratch memory

    def differentiate(start: int, stop: int) -> None:
        if not hasattr(own, "scratch"):
            own.scratch = _make_scratch(scores, task, ranges)
        _differentiate_ranges(task, scores, states, ranges, own.scratch, start, stop)

    run_blocks(differentiate, ranges.number * problem.heads, 1)
    return _combine(problem, task), states.lost.astype(bool)


def _make_states(
    problem: RaggedAttention,
    scores: Scores,
    amounts: np.ndarray,
    gradient: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
) -> States:
    cells, heads, head_dim = problem.cells, problem.heads, problem.head_dim
    lanes, width = scores.lanes, -(-head_dim // LANES) * LANES
    states = States(
        turned=aligned(cells * heads * head_dim * lanes),
        straight=aligned(cells * heads * problem.queries * width),
        delta=aligned(cells * heads * lanes),
        inverse=aligned(cells * heads * lanes),
        shift=aligned(cells * heads * lanes),
        lost=np.zeros(cells, np.uint8),
    )
    given = gradient.view(-1).numpy(), delta.view(-1).numpy(), log_sum_exp.view(-1).numpy()
    offsets = problem.offsets.numpy()
    run_blocks(
        lambda start, stop: _fill_states(
            scores, states, *given, amounts, offsets, problem.queries, width, start, stop
        ),
        cells,
        64,
    )
    return states


def _sort_entries(
    offsets: np.ndarray, ids: np.ndarray, amounts: np.ndarray, repeats: np.ndarray, states: States
) -> Ranges:
    cells, entries = len(offsets) - 1, len(ids)
    rows = np.flatnonzero(repeats)
    rows = rows[np.argsort(-repeats[rows], kind="stable")]
    ends = repeats[rows].cumsum()  # of the entries of the rows so far
    bounds = [0]
    while (start := bounds[-1]) < len(rows):
        passed = ends[start] - repeats[rows[start]]
        stop = min(
            int(np.searchsorted(ends, passed + VISIT * cells, "right")),
            int(np.searchsorted(-repeats[rows], -repeats[rows[start]] // ALIKE, "right")),
            start + MOST_ROWS,
        )
        bounds.append(max(stop, start + 1))
    number = len(bounds) - 1
    place = np.empty(len(repeats), np.int32)  # of a row: range · MOST_ROWS + rank within it
    for i in range(number):
        inside = rows[bounds[i] : bounds[i + 1]]
        place[inside] = np.arange(len(inside)) + i * MOST_ROWS
    starts = np.zeros(number * cells + 1, np.int64)
    run_blocks(
        lambda start, stop: _count_entries(
            starts[1:], ids, place, offsets, states.lost, start, stop
        ),
        cells,
        64,
    )
    np.cumsum(starts, out=starts)
    ranges = Ranges(
        number,
        cells,
        rows,
        np.array(bounds),
        starts,
        np.empty(entries, np.int32),
        np.empty(entries, np.float32),
    )
    run_blocks(
        lambda start, stop: _place_entries(
            ranges, ids, amounts, place, offsets, states.lost, start, stop
        ),
        cells,
        64,
    )
    return ranges


def _make_task(problem: RaggedAttention, scores: Scores, ranges: Ranges) -> Task:
    heads, head_dim, queries = problem.heads, problem.head_dim, problem.queries
    width = -(-head_dim // LANES) * LANES
    value_part = torch.zeros(1, heads, head_dim)
    if problem.value_part is not None:
        value_part = problem.value_part.view(-1, heads, head_dim)
    bins = len(value_part)

    def pad(tensor: Tensor) -> np.ndarray:
        return torch.nn.functional.pad(tensor, (0, width - head_dim)).reshape(-1).numpy()

    return Task(
        queries=queries,
        width=width,
        bins=bins,
        discrete=problem.amounts is None or not problem.amounts.is_floating_point(),
        values=problem.value.view(-1).numpy(),
        value_part=pad(value_part),
        plain_queries=pad((problem.query[0].double() * problem.scale).float().transpose(0, 1)),
        key_gradient=np.zeros(problem.key.numel(), np.float32),
        value_gradient=np.zeros(problem.value.numel(), np.float32),
        query_sums=np.zeros(ranges.number * heads * head_dim * scores.lanes),
        score_sums=np.zeros(ranges.number * heads * bins * scores.lanes),
        value_sums=np.zeros(ranges.number * heads * bins * width),
    )


def _make_scratch(scores: Scores, task: Task, ranges: Ranges) -> Scratch:
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
        rows=aligned(ROWS * width),
        query_sums=aligned(scores.head_dim * lanes),
        keys=np.zeros(ROWS * scores.head_dim),
        powers=aligned(ROWS * lanes),
    )


def _combine(problem: RaggedAttention, task: Task) -> Gradients:
    """Sum over ranges, and turn gradients of scores into those of queries and key parts."""
    heads, head_dim, queries, scale = (
        problem.heads, problem.head_dim, problem.queries, problem.scale,
    )  # fmt: skip
    lanes = -(-queries // LANES) * LANES

    def total(array: np.ndarray, *shape: int) -> Tensor:
        return torch.from_numpy(array.reshape(-1, *shape).sum(0))

    query = total(task.query_sums, heads, head_dim, lanes)[:, :, :queries].permute(2, 0, 1)
    scores = total(task.score_sums, heads, task.bins, lanes)[:, :, :queries].transpose(0, 1)
    values = total(task.value_sums, heads, task.bins, task.width)[..., :head_dim].transpose(0, 1)
    key_part = value_part = None
    if problem.key_part is not None:
        # gradients of scores, times amounts, over the queries: [bins, h, q] · [q, h, d]
        exact = problem.query[0].double() * problem.scale
        parts = problem.key_part.double().view(task.bins, heads, head_dim)
        key_part = (scores[..., None] * exact.transpose(0, 1)).sum(2)
        query = query + (scores[..., None] * parts[:, :, None]).sum(0).transpose(0, 1)
        key_part, value_part = (
            part.view(problem.key_part.shape).float() for part in (key_part, values.contiguous())
        )
    return Gradients(
        (query * scale).float()[None].contiguous(),
        torch.from_numpy(task.key_gradient).view_as(problem.key),
        torch.from_numpy(task.value_gradient).view_as(problem.value),
        key_part,
        value_part,
    )


@njit(nogil=True, cache=True)
def _count_entries(counts, ids, place, offsets, lost, start, stop):
    """counts[range · cells + cell], for cells ``start`` to ``stop``."""
    cells = len(offsets) - 1
    for cell in range(start, stop):
        if not lost[cell]:
            for i in range(offsets[cell], offsets[cell + 1]):
                counts[place[ids[i]] // MOST_ROWS * cells + cell] += 1


@njit(nogil=True, cache=True)
def _place_entries(ranges, ids, amounts, place, offsets, lost, start, stop):
    """Sort the entries of cells ``start`` to ``stop`` into ranges."""
    following = np.empty(ranges.number, np.int64)
    for cell in range(start, stop):
        if lost[cell]:
            continue
        for i in range(ranges.number):
            following[i] = ranges.starts[i * ranges.cells + cell]
        for i in range(offsets[cell], offsets[cell + 1]):
            range_, rank = divmod(place[ids[i]], MOST_ROWS)
            at = following[range_]
            ranges.ranks[at], ranges.amounts[at] = rank, amounts[i]
            following[range_] = at + 1


@njit(nogil=True, cache=True)
def _fill_states(
    scores, states, gradient, delta, log_sum_exp, amounts, offsets, queries, width, start, stop
):
    """`States` of cells ``start`` to ``stop``."""
    heads, d, lanes = scores.heads, scores.head_dim, scores.lanes
    for cell in range(start, stop):
        first, last = offsets[cell], offsets[cell + 1]
        if first == last:
            continue
        highest, lowest = amounts[first], amounts[first]
        for i in range(first, last):
            highest, lowest = max(highest, amounts[i]), min(lowest, amounts[i])
        for h in range(heads):
            at = (cell * heads + h) * lanes
            for j in range(queries):
                source = (cell * heads + h) * queries + j
                column = h * lanes + j
                if scores.binned:
                    shift = scores.shift[column]
                else:
                    high, low = highest * scores.slope[column], lowest * scores.slope[column]
                    shift = np.rint(max(high, low)) - F32(SCALE)
                    if not max(abs(high), abs(low)) < LARGEST_EXPONENT:
                        states.lost[cell] = 1
                log2 = np.float64(shift) - np.float64(log_sum_exp[source]) * math.log2(math.e)
                states.shift[at + j] = shift
                states.inverse[at + j] = F32(np.exp2(log2))
                states.delta[at + j] = -delta[source]
                if not SMALLEST <= -log2 <= LARGEST:
                    states.lost[cell] = 1
                source = ((cell * queries + j) * heads + h) * d
                straight, turned = ((cell * heads + h) * queries + j) * width, at * d + j
                for i in range(d):
                    states.straight[straight + i] = gradient[source + i]
                    states.turned[turned + i * lanes] = gradient[source + i]


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
        scale((F32(1.0),), s.products, k * lanes, states.delta, at, lanes)
        if scores.binned:
            part = (row * scores.heads + h) * width
            add((), s.entry_values, k * width, s.values, rank * width, task.value_part, part, width)
        else:
            add_scaled(
                (amount,), s.entry_values, k * width, task.value_part, h * width,
                s.values, rank * width, width,
            )  # fmt: skip
    multiply_add(
        s.products, 0, lanes, count, lanes,
        s.entry_values, 0, width, 1, states.turned, at * d, lanes, d,
    )  # fmt: skip
    fill((F32(0.0),), s.rows, 0, s.rows, 0, count * width)
    multiply_add(
        s.rows, 0, width, count, width, s.weights, 0, lanes, 1,
        states.straight, (cell * scores.heads + h) * task.queries * width, width, task.queries,
    )  # fmt: skip
    multiply((), s.products, 0, s.products, 0, s.weights, 0, count * lanes)
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
def _end_chunk(task, scores, range_, h, s):
    """Add the amounts' part of the chunk to the range's sums."""
    at = range_ * scores.heads + h
    for part, sums, size in (
        (s.score_part, task.score_sums, task.bins * scores.lanes),
        (s.value_part, task.value_sums, task.bins * task.width),
    ):
        for j in range(size):
            sums[at * size + j] += np.float64(part[j])
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
def _close_range(task, scores, ranges, range_, h, s):
    """Write the gradients of a range's rows, and what it gives to those of the queries."""
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
                task.key_gradient[place + i] = s.rows[k * width + i]
                task.value_gradient[place + i] = s.value_gradients[(start + k) * width + i]
                s.rows[k * width + i] = scores.keys[place + i]
        multiply_add(
            s.query_sums, 0, lanes, d, lanes, s.rows, 0, 1, width,
            s.scores, start * lanes, lanes, count,
        )  # fmt: skip
    at = (range_ * scores.heads + h) * d * lanes
    for j in range(d * lanes):
        task.query_sums[at + j] = np.float64(s.query_sums[j])


def _compiled(sources: str) -> Any:
    """The compiled function that is kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def differentiate_ranges(task_, scores_, states_, ranges_, scratch_, start, stop):
        if len(sources):
            task, scores, states = borrow(task_), borrow(scores_), borrow(states_)
            ranges, s = borrow(ranges_), borrow(scratch_)
            for item in range(start, stop):
                range_, h = item // scores.heads, item % scores.heads
                _open_range(task, scores, ranges, range_, h, s)
                scratch_.made[:] = -1
                rows = ranges.bounds[range_ + 1] - ranges.bounds[range_]
                chunk, row_chunk, begun = 0, 0, False
                for cell in range(ranges.cells):
                    place = range_ * ranges.cells + cell
                    first, last = ranges.starts[place], ranges.starts[place + 1]
                    for at in range(first, last, TILE):
                        count = min(TILE, last - at)
                        _pass_tile(at, count, cell, h, task, scores, states, ranges, s)
                        chunk += count
                        row_chunk += count
                        if chunk >= CHUNK:
                            _end_chunk(task, scores, range_, h, s)
                            chunk = 0
                        if row_chunk >= ROW_CHUNK * rows:
                            _end_row_chunk(rows, scores.lanes, task.width, begun, s)
                            row_chunk, begun = 0, True
                _end_chunk(task, scores, range_, h, s)
                if begun:
                    _end_rows(rows, scores.lanes, task.width, s)
                _close_range(task, scores, ranges, range_, h, s)

    return differentiate_ranges


_differentiate_ranges = _compiled(digest())
