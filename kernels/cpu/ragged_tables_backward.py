"""Ragged attention of shared queries over tables: the backward.

As queries are the same for all cells, gradients of keys need no product per entry: gradients of
scores [q] are summed for each row of the table, and one product with the queries (for the keys),
or with the keys (for the queries), ends the call. Per entry, and 16 queries of a head, remain

    1 to make the weight again: factor of the row times factor of the amount, see `ragged_tables`
    d to multiply the value row with the output's gradient, and 1 for the gradient of the score
    d to multiply the weights with the output's gradient, for the value row
    1 to add to the row's sums of scores, 1 to the amount's

multiplications or additions: 288 vectors of them at the paper's sizes, against the forward's 152.
Measured on two cores at 512 cells of 1,000 genes, real frequencies, 2.2 to 2.7 times its time.

Random words of dropped weights, which are made again (see `dropout`), take 0.2 to 0.3 of that.

Memory decides how they are ordered. A row has factors and sums of 512 bytes and a value row and its
gradient of 128 each. So rows are shared out in *ranges*, (range, head) by (range, head), and a
thread copies what belongs to a range to its own memory, passes over all cells, and writes the
range's gradients: no two threads write to the same row, a row's sums are in the order of cells
and entries, and what is in work lies in the second-level cache. Rows are ranked by how often they
occur: a few hundred rows make up the first ranges, of which every cell has many, and rows that
occur once come last, when their memory has to be fetched in any case. Entries are sorted by range
beforehand (by counting, 12 bytes each); a range has on average `VISIT` entries of a cell, whose
state takes 9 KiB per head.

Sums over all rows or entries (queries, parts) are summed for each range, in float32 up to `CHUNK`
entries and in float64 beyond, and the ranges in their order. Nothing depends on the number of
threads.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..ragged import Gradients, RaggedAttention
from ..threads import run_blocks
from .attention import LARGEST_EXPONENT, SCALE
from .compiled import announce_compilation
from .dropout import make_dropout
from .ragged_ranges import Ranges, States, Sums, Task, differentiate, make_scratch
from .ragged_tables import LARGEST, SMALLEST, Scores, amounts_of, make_scores
from .simd import LANES, aligned

F32 = np.float32

VISIT = 100  # entries of a cell in a range of rows, on average
MOST_ROWS = 2048  # of a range: 1.3 MB for a head of 64 queries
ALIKE = 8  # times as often as a range's last row may its first one occur
MOST_CELLS = 1024  # in a turn: their state takes 18 MB at the paper's sizes


def backward(
    problem: RaggedAttention, gradient: Tensor, delta: Tensor, log_sum_exp: Tensor
) -> tuple[Gradients, np.ndarray]:
    """Gradients of all cells but those that are lost, and which these are: bool [c].

    ``problem`` is of float32 with int64 ids, and `ragged_tables.suits`.
    """
    scores, task = make_scores(problem), _make_task(problem)
    totals = Sums(*(np.zeros(size) for size in _sizes(scores, task)))
    lost = np.zeros(problem.cells, bool)
    announce_compilation(differentiate, 20)
    for start in range(0, problem.cells, MOST_CELLS):
        turn = slice(start, min(problem.cells, start + MOST_CELLS))
        part = _slice(problem, turn.start, turn.stop)
        states = _make_states(part, scores, gradient[turn], delta[turn], log_sum_exp[turn])
        ranges = _sort_entries(part, states, start)
        sums = Sums(*(np.zeros(ranges.number * size) for size in _sizes(scores, task)))
        _differentiate_turn(task, scores, states, ranges, sums)
        for total, of_ranges in zip(totals, sums, strict=True):
            total += of_ranges.reshape(ranges.number, len(total)).sum(0)
        lost[turn] = states.lost
    return _finish(problem, scores, task, totals), lost


def _slice(problem: RaggedAttention, start: int, stop: int) -> RaggedAttention:
    """The problem of cells ``start`` to ``stop``."""
    offsets = problem.offsets[start : stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    assert problem.ids is not None
    return problem._replace(
        offsets=offsets - offsets[0],
        ids=problem.ids[entries],
        amounts=None if problem.amounts is None else problem.amounts[entries],
    )


def _sizes(scores: Scores, task: Task) -> tuple[int, int, int]:
    """Lengths of the arrays of `Sums`, of one range."""
    heads, lanes = scores.heads, scores.lanes
    return (
        heads * scores.head_dim * lanes,
        heads * task.bins * lanes,
        heads * task.bins * task.width,
    )


def _differentiate_turn(
    task: Task, scores: Scores, states: States, ranges: Ranges, sums: Sums
) -> None:
    own = threading.local()  # a thread's scratch memory

    def differentiate_items(start: int, stop: int) -> None:
        if not hasattr(own, "scratch"):
            own.scratch = make_scratch(scores, task, ranges)
        differentiate(task, scores, states, ranges, sums, own.scratch, start, stop)

    run_blocks(differentiate_items, ranges.number * scores.heads, 1)


def _make_states(
    problem: RaggedAttention,
    scores: Scores,
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
    amounts, offsets = amounts_of(problem), problem.offsets.numpy()
    run_blocks(
        lambda start, stop: _fill_states(
            scores, states, *given, amounts, offsets, problem.queries, width, start, stop
        ),
        cells,
        64,
    )
    return states


def _sort_entries(problem: RaggedAttention, states: States, first_cell: int) -> Ranges:
    """Divide rows into ranges, and sort entries of cells that are not lost by them."""
    assert problem.ids is not None
    ids, amounts, offsets = problem.ids.numpy(), amounts_of(problem), problem.offsets.numpy()
    cells, entries = problem.cells, problem.entries
    repeats = np.bincount(ids, minlength=len(problem.key))
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
        first_cell,
        rows,
        np.array(bounds),
        starts,
        np.empty(entries, np.int32),
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


def _make_task(problem: RaggedAttention) -> Task:
    heads, head_dim, queries = problem.heads, problem.head_dim, problem.queries
    width = -(-head_dim // LANES) * LANES
    value_part = torch.zeros(1, heads, head_dim)
    if problem.value_part is not None:
        value_part = problem.value_part.view(-1, heads, head_dim)

    def pad(tensor: Tensor) -> np.ndarray:
        return torch.nn.functional.pad(tensor, (0, width - head_dim)).reshape(-1).numpy()

    return Task(
        queries=queries,
        width=width,
        bins=len(value_part),
        discrete=problem.amounts is None or not problem.amounts.is_floating_point(),
        dropout=make_dropout(problem),
        values=problem.value.view(-1).numpy(),
        value_part=pad(value_part),
        plain_queries=pad((problem.query[0].double() * problem.scale).float().transpose(0, 1)),
        key_gradient=np.zeros(problem.key.numel(), np.float32),
        value_gradient=np.zeros(problem.value.numel(), np.float32),
    )


def _finish(problem: RaggedAttention, scores: Scores, task: Task, totals: Sums) -> Gradients:
    """Gradients of queries and parts from sums over everything, in float64."""
    heads, head_dim, queries, bins = problem.heads, problem.head_dim, problem.queries, task.bins
    query = totals.query.reshape(heads, head_dim, -1)[..., :queries].transpose(2, 0, 1)

    def result(array: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).view(like.shape)

    key_part = value_part = None
    if problem.key_part is not None:
        # amounts · gradients of scores [bins, h, q, 1], times queries [h, q, d], or parts
        of_scores = totals.scores.reshape(heads, bins, -1, 1)[:, :, :queries].swapaxes(0, 1)
        exact = problem.query[0].double().numpy().swapaxes(0, 1)
        parts = problem.key_part.double().numpy().reshape(bins, heads, 1, head_dim)
        query = query + (of_scores * parts).sum(0).swapaxes(0, 1)
        key_part = result((of_scores * exact).sum(2) * problem.scale, problem.key_part)
        values = totals.values.reshape(heads, bins, -1)[..., :head_dim].swapaxes(0, 1)
        value_part = result(values, problem.key_part)
    return Gradients(
        result(query * problem.scale, problem.query),
        result(task.key_gradient, problem.key),
        result(task.value_gradient, problem.value),
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
            ranges.places[at] = i - offsets[cell]
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
                states.delta[at + j] = delta[source]
                if not SMALLEST <= -log2 <= LARGEST:
                    states.lost[cell] = 1
                source = ((cell * queries + j) * heads + h) * d
                straight, turned = ((cell * heads + h) * queries + j) * width, at * d + j
                for i in range(d):
                    states.straight[straight + i] = gradient[source + i]
                    states.turned[turned + i * lanes] = gradient[source + i]
