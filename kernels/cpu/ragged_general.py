"""Ragged attention on a CPU, for any problem.

Forward, threads share out (cell, head, block of queries)s, each computed by one of them from the
cell alone. Backward they share out (cell, head)s; what several cells have in common is summed
afterwards:

- Cells are taken in groups of about `GROUP` entries. Gradients of keys and values are first
  written entry by entry, then added to the rows of the table that were looked up. Every thread
  reads all ids of the group and adds what belongs to its stripe of rows, in the order of entries.
- Shared queries have a gradient from each cell of the group, added in the order of cells; parts
  one from each entry.

So every number has one writer and one order, whatever the number of threads, and sums over cells
are float64: a gene's row may get 100,000 gradients. Without ids nothing is summed over cells, and
the gradients of entries are the result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..ragged import Gradients, RaggedAttention
from ..threads import run_blocks
from .compiled import announce_compilation, digest
from .dropout import make_dropout
from .ragged_cells import AFFINE, BINNED, BLOCK, Cells, attend, differentiate, make_scratch
from .simd import LANES, borrow

GROUP = 65_536  # entries, whose gradients of keys and values wait for their sum
GROUP_QUERIES = 2**22  # floats of gradients of shared queries
STRIPES = 16  # of rows and columns that threads sum: several for each thread, to balance


class Attended(NamedTuple):
    """Results of the forward."""

    output: np.ndarray  # float32 [c · q · h · d]
    log_sum_exp: np.ndarray  # float32 [c · h · q]


class Group(NamedTuple):
    """Gradients that a group of cells gets, and those that it makes."""

    gradient: np.ndarray  # float32 [c · q · h · d]
    delta: np.ndarray  # float32 [c · h · q]
    log_sum_exp: np.ndarray  # float32 [c · h · q]
    query: np.ndarray  # float32 [cells · q · h · d]: of the group, or all
    key: np.ndarray  # float32 [entries · h · d]: of the group, or all
    value: np.ndarray  # float32 [entries · h · d]
    bias: np.ndarray  # float32 [n · h], or empty
    first_cell: int  # the cell that query begins with
    first_row: int  # the entry that key and value begin with


class Sums(NamedTuple):
    """Gradients over all cells so far, float64; empty where there is nothing to sum."""

    query: np.ndarray  # [q · h · d]
    key: np.ndarray  # [r · h · d]
    value: np.ndarray  # [r · h · d]
    key_part: np.ndarray  # [1 or bins · h · d]
    value_part: np.ndarray  # [1 or bins · h · d]


def forward(
    problem: RaggedAttention, numbers: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output [c · q · h · d] and log-sum-exp [c · h · q] of a problem of float32.

    ``numbers`` are those of the cells in their batch, int64 [c], where they are some of it only.
    """
    cells = _make_cells(problem, numbers)
    found = Attended(
        np.empty(problem.cells * problem.queries * problem.heads * problem.head_dim, np.float32),
        np.empty(problem.cells * problem.heads * problem.queries, np.float32),
    )
    announce_compilation(_attend_all, 10)
    own = threading.local()  # a thread's scratch memory

    def task(start: int, stop: int) -> None:
        if not hasattr(own, "scratch"):
            own.scratch = make_scratch(problem.head_dim)
        _attend_all(cells, found, own.scratch, start, stop)

    blocks = -(-problem.queries // BLOCK)
    _share_out(task, problem.cells * problem.heads * blocks)
    return found.output, found.log_sum_exp


def backward(
    problem: RaggedAttention,
    gradient: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
    numbers: np.ndarray | None = None,
) -> Gradients:
    """Gradients of a problem of float32; see `ragged.backward`, and `forward` for ``numbers``."""
    cells = _make_cells(problem, numbers)
    looked_up, shared = problem.ids is not None, len(problem.query) == 1
    width = problem.heads * problem.head_dim
    row = problem.queries * width
    sums = _make_sums(problem)
    offsets = problem.offsets.numpy()
    bounds = list(_groups(offsets, max(1, GROUP_QUERIES // row)))
    queries, entries = problem.cells, problem.entries
    if shared:
        queries = max((stop - start for start, stop in bounds), default=0)
    if looked_up:
        entries = max((int(offsets[stop] - offsets[start]) for start, stop in bounds), default=0)
    group = Group(
        _flat(gradient),
        _flat(delta),
        _flat(log_sum_exp),
        np.empty(queries * row, np.float32),
        np.empty(entries * width, np.float32),
        np.empty(entries * width, np.float32),
        np.zeros(0 if problem.bias is None else problem.bias.numel(), np.float32),
        0,
        0,
    )
    announce_compilation(_differentiate_all, 10)
    own = threading.local()

    for first, stop in bounds:
        part = group._replace(
            first_cell=first if shared else 0, first_row=int(offsets[first]) if looked_up else 0
        )

        def differentiate_items(start: int, end: int, part: Group = part, at: int = first) -> None:
            if not hasattr(own, "scratch"):
                own.scratch = make_scratch(problem.head_dim)
            items = at * problem.heads
            _differentiate_all(cells, part, own.scratch, items + start, items + end)

        _share_out(differentiate_items, (stop - first) * problem.heads)
        run_blocks(partial(_add_group, cells, part, sums, first, stop), STRIPES, 1)

    def result(like: Tensor, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).float().view(like.shape)

    return Gradients(
        result(problem.query, sums.query if shared else group.query),
        result(problem.key, sums.key if looked_up else group.key),
        result(problem.value, sums.value if looked_up else group.value),
        None if problem.key_part is None else result(problem.key_part, sums.key_part),
        None if problem.value_part is None else result(problem.value_part, sums.value_part),
        None if problem.bias is None else result(problem.bias, group.bias),
    )


def _make_cells(problem: RaggedAttention, numbers: np.ndarray | None) -> Cells:
    parts = 0
    if problem.key_part is not None:
        parts = BINNED if problem.binned else AFFINE
    no_ids = np.empty(0, np.int64)
    return Cells(
        _flat(problem.query),
        _flat(problem.key),
        _flat(problem.value),
        problem.offsets.numpy(),
        no_ids if problem.ids is None else problem.ids.numpy(),
        np.empty(0, np.float32) if problem.amounts is None else problem.amounts.float().numpy(),
        _flat(problem.key_part),
        _flat(problem.value_part),
        _flat(problem.bias),
        len(problem.query) == 1,
        problem.ids is not None,
        parts,
        problem.bias is not None,
        problem.queries,
        problem.heads,
        problem.head_dim,
        float(problem.scale),
        make_dropout(problem),
        np.arange(problem.cells) if numbers is None else numbers,
    )


def _flat(tensor: Tensor | None) -> np.ndarray:
    """float32; empty for None."""
    return np.empty(0, np.float32) if tensor is None else tensor.reshape(-1).numpy()


def _make_sums(problem: RaggedAttention) -> Sums:
    def zeros(tensor: Tensor | None, wanted: bool = True) -> np.ndarray:
        return np.zeros(tensor.numel() if tensor is not None and wanted else 0)

    looked_up = problem.ids is not None
    return Sums(
        zeros(problem.query, len(problem.query) == 1),
        zeros(problem.key, looked_up),
        zeros(problem.value, looked_up),
        zeros(problem.key_part),
        zeros(problem.value_part),
    )


def _groups(offsets: np.ndarray, most_cells: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive cells: at least one, else at most `GROUP` entries."""
    start, cells = 0, len(offsets) - 1
    while start < cells:
        stop = int(np.searchsorted(offsets, offsets[start] + GROUP, "right")) - 1
        stop = max(start + 1, min(stop, start + most_cells, cells))
        yield start, stop
        start = stop


def _share_out(task: Any, items: int) -> None:
    """Items of uneven cost: many small ranges for each thread."""
    run_blocks(task, items, max(1, items // (32 * torch.get_num_threads())))


@njit(nogil=True, inline="always")
def _add_row(sums, row, gradients, at, width, factor):
    """sums[row] += factor · gradients[at], rows of ``width`` numbers."""
    for j in range(width):
        sums[row * width + j] += factor * np.float64(gradients[at * width + j])


@njit(nogil=True)
def _add_stripe(cells, group, sums, first_cell, last_cell, stripe):
    """Add what belongs to a stripe of rows and of columns, from a group of cells."""
    width = cells.heads * cells.head_dim
    for entry in range(cells.offsets[first_cell], cells.offsets[last_cell]):
        at = entry - group.first_row
        if cells.looked_up and cells.ids[entry] % STRIPES == stripe:
            _add_row(sums.key, cells.ids[entry], group.key, at, width, 1.0)
            _add_row(sums.value, cells.ids[entry], group.value, at, width, 1.0)
        if cells.parts == BINNED and np.int64(cells.amounts[entry]) % STRIPES == stripe:
            row = np.int64(cells.amounts[entry])
            _add_row(sums.key_part, row, group.key, at, width, 1.0)
            _add_row(sums.value_part, row, group.value, at, width, 1.0)
        if cells.parts == AFFINE:
            amount = np.float64(cells.amounts[entry])
            for start in range(stripe * LANES, width, STRIPES * LANES):
                for j in range(start, min(width, start + LANES)):
                    sums.key_part[j] += amount * np.float64(group.key[at * width + j])
                    sums.value_part[j] += amount * np.float64(group.value[at * width + j])
    if cells.shared:
        width *= cells.queries
        for i in range(last_cell - first_cell):
            for start in range(stripe * LANES, width, STRIPES * LANES):
                for j in range(start, min(width, start + LANES)):
                    sums.query[j] += np.float64(group.query[i * width + j])


def _compiled(sources: str) -> Any:
    """The compiled functions that are kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def attend_all(cells, found, scratch, start, stop):
        if len(sources):
            cells_, found_, scratch_ = borrow(cells), borrow(found), borrow(scratch)
            blocks = (cells.queries + BLOCK - 1) // BLOCK
            for item in range(start, stop):
                cell, h = item // blocks // cells.heads, item // blocks % cells.heads
                block = item % blocks
                attend(cells_, cell, h, block * BLOCK, found_.output, found_.log_sum_exp, scratch_)

    @njit(nogil=True, cache=True)
    def differentiate_all(cells, group, scratch, start, stop):
        if len(sources):
            cells_, g, scratch_ = borrow(cells), borrow(group), borrow(scratch)
            for item in range(start, stop):
                cell, h = item // cells.heads, item % cells.heads
                differentiate(
                    cells_, cell, h, g.first_row, g.gradient, g.delta, g.log_sum_exp,
                    g.query, cell - g.first_cell, g.key, g.value, g.bias, scratch_,
                )  # fmt: skip

    @njit(nogil=True, cache=True)
    def add_group(cells, group, sums, first_cell, last_cell, start, stop):
        if len(sources):
            cells_, group_, sums_ = borrow(cells), borrow(group), borrow(sums)
            for stripe in range(start, stop):
                _add_stripe(cells_, group_, sums_, first_cell, last_cell, stripe)

    return attend_all, differentiate_all, add_group


_attend_all, _differentiate_all, _add_group = _compiled(digest())
