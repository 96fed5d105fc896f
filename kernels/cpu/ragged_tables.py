"""Ragged attention of shared queries over tables: the forward, as fast as the encoder's.

Where all cells have the same queries and look their keys up, the exponential of a score is a
product: of a factor of the row, 2^(q · key), which is made once per call for the rows that occur,
and one of the amount. So this is what `attention.cross_attend` sums, and it does it here too;
`attention.py` says how. Made anew for every call, the table takes 8 % of the forward of 512 cells
of 1,000 genes: 15,000 rows occur in them, and a score costs 2 d multiply-adds of doubles for 16
queries and then 14 instructions.

Where weights are dropped, denominators are summed before, in the same order as ever: a log-sum-exp
has the same bits with dropout as without.

Factors of rows are not relative to anything, so that a row's bits depend on nothing else, and
scores may range from about -40 to 40. Those of amounts are relative to the cell's largest, times
2^`SCALE`. A cell of which a total lies outside of 2^`SMALLEST` to 2^`LARGEST` is *lost*: its
result is not valid, and `ragged` has it computed by the general path. Within these limits
what is flushed to zero is below 2^-60 per entry, and no sum overflows. A lost cell is one by its
own scores, and so a cell's bits depend on the cell alone.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from ..ragged import RaggedAttention
from ..threads import run_blocks
from .attention import GROUP, SCALE, cross_attend, end_chunk
from .compiled import announce_compilation, digest
from .dropout import make_dropout
from .simd import LANES, TILE_ROWS, aligned, borrow, multiply_exactly
from .tables import Tables, make_scratch
from .vector_math import powers_of_two

F32 = np.float32

ROWS = 32  # of a table, made at a time
SMALLEST, LARGEST = -10, 114  # logarithms of totals, to base 2, of cells that are not lost
MOST_CELLS = 64  # per call of compiled code
MOST_WORK = 8192  # heads · queries · head_dim: sums of a group of cells in a second-level cache


class Scores(NamedTuple):
    """What scores are made of, in powers of two: log2(e) is part of the queries."""

    lanes: int  # queries, rounded up to whole vectors
    heads: int
    head_dim: int
    keys: np.ndarray  # float32 [r · h · d]
    queries: np.ndarray  # float64 [h · d · lanes]: times scale and log2(e)
    binned: bool
    # of the amount: [h · lanes] for an affine part, else [bins · h · lanes]
    slope: np.ndarray  # float32; empty for bins
    slope_rest: np.ndarray  # float32: what rounding took from the slope
    factors: np.ndarray  # float32: 2^(score of the bin - shift); empty if affine
    shift: np.ndarray  # float32 [h · lanes], whole numbers: of the bins' factors


class RowScratch(NamedTuple):
    """Memory of one thread that makes rows of powers."""

    keys: np.ndarray  # float64 [ROWS · d]
    powers: np.ndarray  # float32 [ROWS · lanes]


class Looked(NamedTuple):
    """Inputs and outputs of the forward."""

    rank: np.ndarray  # int32 [r]: of a row, among the rows that occur
    ids: np.ndarray  # integers [n]
    ranks: np.ndarray  # int32 [n]: of each entry's row; written here
    amounts: np.ndarray  # float32 [n]
    offsets: np.ndarray  # int64 [c + 1]
    pads: np.ndarray  # float32 [c]: none
    output: np.ndarray  # float32 [c · q · h · d]
    log_sum_exp: np.ndarray  # float32 [c · h · q]
    lost: np.ndarray  # uint8 [c]


def suits(problem: RaggedAttention) -> bool:
    """Whether `forward` can compute a problem; decided by its kind, never by its numbers."""
    work = problem.heads * problem.head_dim * -(-problem.queries // LANES) * LANES
    return (
        len(problem.query) == 1
        and problem.ids is not None
        and problem.bias is None
        and work <= MOST_WORK
    )


def forward(problem: RaggedAttention) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output [c · q · h · d], log-sum-exp [c · h · q], and which cells are lost: bool [c].

    ``problem`` is of float32 with int64 ids, and `suits`.
    """
    assert problem.ids is not None
    cells, width = problem.cells, problem.heads * problem.head_dim
    rank, rows = _find_rows(problem.ids.numpy(), len(problem.key))
    scores = make_scores(problem)
    tables = _make_tables(problem, scores, rows)
    looked = Looked(
        rank,
        problem.ids.numpy(),
        np.empty(problem.entries, np.int32),
        amounts_of(problem),
        problem.offsets.numpy(),
        np.zeros(cells, np.float32),
        np.empty(cells * problem.queries * width, np.float32),
        np.empty(cells * problem.heads * problem.queries, np.float32),
        np.zeros(cells, np.uint8),
    )
    discrete = problem.amounts is None or not problem.amounts.is_floating_point()
    dropout = make_dropout(problem)
    own = threading.local()  # a thread's scratch memory

    def task(start: int, stop: int) -> None:
        if not hasattr(own, "scratch"):
            own.scratch = make_scratch(tables)
        _attend_cells(looked, tables, scores, own.scratch, discrete, dropout, start, stop)

    share = cells // (4 * torch.get_num_threads())
    run_blocks(task, cells, min(MOST_CELLS, (share // GROUP + 1) * GROUP))
    return looked.output, looked.log_sum_exp, looked.lost.astype(bool)


def amounts_of(problem: RaggedAttention) -> np.ndarray:
    """float32 [n]; zeros where there are none."""
    if problem.amounts is None:
        return np.zeros(problem.entries, np.float32)
    return problem.amounts.float().numpy()


def make_scores(problem: RaggedAttention) -> Scores:
    """Queries and what amounts have of a score, in float64 and rounded once."""
    heads, head_dim, queries = problem.heads, problem.head_dim, problem.queries
    lanes = -(-queries // LANES) * LANES
    turned = np.zeros((heads, head_dim, lanes))
    turned[:, :, :queries] = problem.query[0].double().permute(1, 2, 0).numpy()
    turned *= problem.scale * math.log2(math.e)
    slope = np.zeros((1, heads, lanes))
    if problem.key_part is not None:
        part = problem.key_part.double().view(-1, heads, head_dim).numpy()
        for d in range(head_dim):  # in this order whatever the library
            slope = slope + part[:, :, d, None] * turned[None, :, d]
    shift = np.ceil(slope.max(0)) - SCALE
    factors = np.exp2(slope - shift)
    empty = np.empty(0, np.float32)
    rounded = slope.astype(np.float32)
    return Scores(
        lanes,
        heads,
        head_dim,
        problem.key.view(-1).numpy(),
        turned.reshape(-1),
        problem.binned,
        empty if problem.binned else rounded.reshape(-1),
        empty if problem.binned else (slope - rounded).astype(np.float32).reshape(-1),
        factors.astype(np.float32).reshape(-1) if problem.binned else empty,
        shift.astype(np.float32).reshape(-1),
    )


def make_row_scratch(scores: Scores) -> RowScratch:
    return RowScratch(np.zeros(ROWS * scores.head_dim), aligned(ROWS * scores.lanes))


def _make_tables(problem: RaggedAttention, scores: Scores, rows: np.ndarray) -> Tables:
    """What `attention.cross_attend` reads, for the table's ``rows``."""
    heads, head_dim, lanes = scores.heads, scores.head_dim, scores.lanes
    width, dim = heads * lanes, heads * head_dim
    memory = aligned(len(rows) * (width + dim) + LANES)  # read in whole vectors
    value_rows = np.zeros(dim + LANES, np.float32)
    if problem.value_part is not None:
        value_rows = np.pad(problem.value_part.reshape(-1).numpy(), (0, LANES))
    nothing = np.empty(0)
    tables = Tables(
        genes=len(rows),
        patches=problem.queries,
        lanes=lanes,
        heads=heads,
        head_dim=head_dim,
        dim=dim,
        block=-(-(head_dim + 1) // TILE_ROWS) * TILE_ROWS,
        row=width + dim,
        binned=scores.binned,
        table=memory,
        value_factors=scores.factors,
        value_rows=value_rows,
        slope=scores.slope,
        slope_rest=scores.slope_rest,
        keys=nothing,
        queries=nothing,
        value_scores=nothing,
    )
    values = problem.value.view(-1).numpy()

    announce_compilation(_fill_table, 20)

    def task(start: int, stop: int) -> None:
        _fill_table(tables, scores, values, rows, make_row_scratch(scores), start, stop)

    run_blocks(task, len(rows), 2048)
    return tables


@njit(nogil=True, cache=True)
def _find_rows(ids, rows):
    """Rank of each row among the rows that occur, int32 [rows]; those rows, ascending."""
    occurs = np.zeros(rows, np.bool_)
    for i in range(len(ids)):
        occurs[ids[i]] = True
    rank, occurring, count = np.zeros(rows, np.int32), np.empty(rows, np.int64), 0
    for row in range(rows):
        if occurs[row]:
            rank[row], occurring[count] = count, row
            count += 1
    return rank, occurring[:count]


@njit(nogil=True)
def make_powers(out, at, row, scores, rows, first, count, h, s):
    """out[at + k · row, lanes] = 2^(score of rows[first + k]) for up to `ROWS` rows, one head."""
    d, lanes = scores.head_dim, scores.lanes
    for k in range(count):
        source = (rows[first + k] * scores.heads + h) * d
        for i in range(d):
            s.keys[k * d + i] = np.float64(scores.keys[source + i])
    multiply_exactly(
        s.powers, 0, lanes, count, lanes, s.keys, 0, d, scores.queries, h * d * lanes, lanes, d
    )
    for k in range(count):
        powers_of_two((), out, at + k * row, s.powers, k * lanes, lanes)


@njit(nogil=True, error_model="numpy")
def _finish(looked, tables, scores, sums, shift, slot, cell):
    """Output and log-sum-exp of a cell from its sums [h, block, lanes]."""
    heads, d, lanes, queries = tables.heads, tables.head_dim, tables.lanes, tables.patches
    empty = looked.offsets[cell + 1] == looked.offsets[cell]
    for h in range(heads):
        at = (slot * heads + h) * tables.block * lanes
        for j in range(queries):
            total = sums[at + d * lanes + j]
            if not empty and not F32(2.0**SMALLEST) <= total <= F32(2.0**LARGEST):
                looked.lost[cell] = 1
            inverse = F32(0.0) if empty else F32(1.0) / total
            place = ((cell * queries + j) * heads + h) * d
            for i in range(d):
                looked.output[place + i] = sums[at + i * lanes + j] * inverse
            log2 = -np.inf
            if total > 0:
                column = h * lanes + j
                relative = (
                    scores.shift[column] if tables.binned else shift[slot * heads * lanes + column]
                )
                log2 = math.log2(np.float64(total)) + np.float64(relative)
            looked.log_sum_exp[(cell * heads + h) * queries + j] = F32(log2 * math.log(2.0))


def _compiled(sources: str) -> Any:
    """The compiled functions that are kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def attend_cells(looked_, tables_, scores_, scratch_, discrete, dropout, start, stop):
        if len(sources):
            looked, tables = borrow(looked_), borrow(tables_)
            scores, scratch = borrow(scores_), borrow(scratch_)
            for i in range(looked.offsets[start], looked.offsets[stop]):
                looked.ranks[i] = looked.rank[looked.ids[i]]
            for cell in range(start, stop):
                slot = (cell - start) % GROUP
                if slot == 0:
                    cross_attend(
                        looked.ranks, looked.amounts, looked.offsets, looked.pads,
                        cell, min(GROUP, stop - cell), discrete, dropout, tables, scratch,
                    )  # fmt: skip
                end_chunk(slot, tables, scratch)
                _finish(looked, tables, scores, scratch.sums, scratch.shift, slot, cell)

    @njit(nogil=True, cache=True)
    def fill_table(tables_, scores_, values, rows, scratch_, start, stop):
        if len(sources):
            tables, scores, scratch = borrow(tables_), borrow(scores_), borrow(scratch_)
            width, dim = tables.heads * tables.lanes, tables.dim
            for first in range(start, stop, ROWS):
                count = min(ROWS, stop - first)
                for h in range(tables.heads):
                    at = first * tables.row + h * tables.lanes
                    make_powers(
                        tables.table, at, tables.row, scores, rows, first, count, h, scratch
                    )
                for k in range(first, first + count):
                    for i in range(dim):
                        tables.table[k * tables.row + width + i] = values[rows[k] * dim + i]

    return attend_cells, fill_table


_attend_cells, _fill_table = _compiled(digest())
