"""Ragged attention on a GPU: launches the kernels of `ragged.py` and `ragged_backward.py`.

What is launched depends on shapes alone, never on what tensors hold: nothing waits for the device,
and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..ragged import Gradients, RaggedAttention
from .attention import CHUNK
from .configuration import Configuration
from .encoder import table_type
from .faults import faults, raise_faults
from .launching import launch
from .ragged import ENTRIES_PER_PLACE, attend_slots, merge_slots
from .ragged_backward import differentiate_slots
from .ragged_shapes import backward_shape, forward_shape, padded
from .segments import sum_pieces, sum_slots

ROW_BYTES = 2**30  # of gradients per entry that are kept for sorting: more takes more passes
MOST_PARTS = 1024  # numbers of a head's parts whose gradients are summed in registers
SUM, SUM_WIDTH = Configuration(32, 4, 1), 64


def forward(problem: RaggedAttention) -> tuple[Tensor, Tensor]:
    """Output [c, q, h, d] in the dtype of the queries; log-sum-exp float32 [c, h, q].

    Raises
    ------
    ValueError
        If an earlier batch was found to be wrong, or this one already was (in the interpreter).
    """
    launch = _Launch(problem)
    cells, queries, heads = problem.cells, problem.queries, problem.heads
    output = launch.empty(cells, *problem.query.shape[1:], dtype=problem.query.dtype)
    log_sum_exp = launch.empty(cells, heads, queries)
    places = problem.entries // ENTRIES_PER_PLACE.value
    normalizers = launch.empty(places, heads, queries, 2)
    partials = launch.empty(places, heads, queries, problem.head_dim)
    most, configuration = forward_shape(problem.query.dtype, launch.dim)
    block = min(most, launch.queries)
    programs = heads * triton.cdiv(queries, block)  # per slot, per cell
    launch.run(
        attend_slots, launch.slots * programs, configuration,
        *launch.inputs, output, log_sum_exp, normalizers, partials, launch.faults,
        *launch.counts, *launch.drop, **launch.constants, QUERIES=block,
        TILE=configuration.tile, STAGES=configuration.stages,
    )  # fmt: skip
    launch.run(
        merge_slots, cells * programs, configuration,
        problem.offsets, output, log_sum_exp, normalizers, partials, launch.faults,
        cells, problem.entries, queries, heads, launch.drop[-1], **launch.dims,
        QUERIES=block, EXACT=problem.query.dtype == torch.float32,
    )  # fmt: skip
    return output, log_sum_exp


def backward(
    problem: RaggedAttention,
    gradient: Tensor,
    delta: Tensor,
    log_sum_exp: Tensor,
    *,
    deterministic: bool,
) -> Gradients:
    """Gradients of everything that has one.

    Parameters
    ----------
    gradient
        Of the output, [c, q, h, d], in the dtype of the queries.
    delta
        What the softmax takes off every score's gradient, float32 [c, h, q].
    log_sum_exp
        Of `forward`.
    deterministic
        Whether gradients of table rows are sums in a fixed order, instead of by atomics.

    Raises
    ------
    ValueError
        As `forward`.
    """
    launch = _Launch(problem)
    tables = _TableGradients(launch, problem, deterministic)
    entries, heads, dtype = problem.entries, problem.heads, problem.query.dtype
    composed = problem.ids is not None or problem.key_part is not None
    most, configuration = backward_shape(dtype, launch.dim, composed, problem.dropout > 0)
    block = min(most, launch.queries)
    one_block = problem.queries <= block
    allocate = launch.empty if one_block else launch.zeros
    of_query = allocate(launch.slots, *problem.query.shape[1:])
    of_bias = None if problem.bias is None else launch.empty(entries, heads)
    for first_head, some_heads in tables.passes():
        launch.run(
            differentiate_slots, launch.slots * some_heads, configuration,
            *launch.inputs, gradient, delta, log_sum_exp,
            of_query, *tables.destinations(some_heads), tables.of_parts, of_bias, launch.faults,
            *launch.counts, *launch.drop, first_head, some_heads, **launch.constants,
            QUERIES=block, ONE_BLOCK=one_block, ATOMIC=tables.atomic, PARTS=tables.parts,
            TILE=configuration.tile, STAGES=configuration.stages,
        )  # fmt: skip
        tables.collect(first_head, some_heads)
    if len(problem.query) == 1:
        query = of_query.sum(0, keepdim=True).to(dtype)
    else:
        query = torch.empty_like(problem.query)
        launch.sum_slots(of_query.flatten(1), problem.offsets, query.flatten(1), entries)
    return Gradients(query, *tables.tables(), *tables.of_key_and_value_part(), of_bias)


class _TableGradients:
    """Gradients of keys, values and parts: where kernels write them, and what is made of that.

    Those of entries that have rows of their own are written in place, others are added up in
    float32 by atomics, or, where sums are to be deterministic, kept for each entry, sorted and
    summed; head by head if they are many. Gradients of parts are summed over each chunk in
    registers; of more bins than fit there, they are sorted and summed too.
    """

    def __init__(self, launch: _Launch, problem: RaggedAttention, deterministic: bool) -> None:
        self.launch, self.problem = launch, problem
        bins = len(problem.key_part) if problem.key_part is not None and problem.binned else 0
        self.parts = padded(bins)
        sort_bins = problem.binned and self.parts * launch.dim > MOST_PARTS
        self.sorted = sort_bins or (problem.ids is not None and deterministic)
        self.atomic = problem.ids is not None and not self.sorted
        rows, *row = problem.key.shape
        self.key, self.value = (
            launch.zeros(rows + 1, *row) if self.atomic else torch.empty_like(problem.key)
            for _ in range(2)
        )
        self.by_row = self.by_bin = self.of_parts = None
        if self.sorted and problem.ids is not None:
            self.by_row = sort_rows(problem.ids, rows)
        if sort_bins:
            assert problem.amounts is not None
            assert problem.key_part is not None
            self.by_bin = sort_rows(problem.amounts, bins)
            self.key_part, self.value_part = (torch.empty_like(problem.key_part) for _ in range(2))
        elif problem.key_part is not None:
            self.of_parts = launch.empty(launch.slots, 2, self.parts, *row)

    def passes(self) -> list[tuple[int, int]]:
        """First head and number of heads of each launch."""
        heads, most = self.problem.heads, self.problem.heads
        if self.sorted:
            per_head = 2 * 4 * self.problem.head_dim * self.problem.entries
            most = max(1, min(heads, ROW_BYTES // max(1, per_head)))
        return [(first, min(most, heads - first)) for first in range(0, heads, most)]

    def destinations(self, some_heads: int) -> tuple[Tensor, Tensor]:
        """Where one launch writes gradients of keys and values."""
        if not self.sorted:
            return self.key, self.value
        shape = (self.problem.entries, some_heads, self.problem.head_dim)
        self.rows = self.launch.empty(*shape), self.launch.empty(*shape)
        return self.rows

    def collect(self, first_head: int, some_heads: int) -> None:
        """Sum what one launch wrote."""
        if not self.sorted:
            return
        column = first_head * self.problem.head_dim
        for rows, table in zip(self.rows, (self.key, self.value), strict=True):
            if self.by_row is None:
                table[:, first_head : first_head + some_heads] = rows
            else:
                self.launch.sum_rows(rows.flatten(1), *self.by_row, table.flatten(1), column)
        if self.by_bin is not None:
            for rows, part in zip(self.rows, (self.key_part, self.value_part), strict=True):
                self.launch.sum_rows(rows.flatten(1), *self.by_bin, part.flatten(1), column)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values."""
        rows, dtype = len(self.problem.key), self.problem.key.dtype
        return self.key[:rows].to(dtype), self.value[:rows].to(dtype)

    def of_key_and_value_part(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the parts."""
        part = self.problem.key_part
        if part is None:
            return None, None
        if self.by_bin is not None:
            return self.key_part, self.value_part
        assert self.of_parts is not None
        sums = (self.of_parts[:, i].sum(0) for i in range(2))  # [parts, h, d] each
        key_part, value_part = (
            total[: len(part)] if self.problem.binned else total.sum(0) for total in sums
        )
        return key_part.to(part.dtype), value_part.to(part.dtype)


def sort_rows(row: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Entries [n] in the order of their rows, and where those of each row begin [number + 1].

    Entries that have no row, which is reported elsewhere, come last and belong to none.
    """
    row = row.long()
    row = torch.where((row < 0) | (row >= number), number, row).int()
    row, order = torch.sort(row, stable=True)
    every = torch.arange(number + 1, dtype=torch.int32, device=row.device)
    return order, torch.searchsorted(row, every)


class _Launch:
    """One batch, and what its kernels are launched with."""

    def __init__(self, problem: RaggedAttention) -> None:
        self.device = problem.query.device
        raise_faults(self.device)
        table_type(problem.query.dtype)
        self.faults = faults(self.device)
        self.slots = problem.cells + problem.entries // CHUNK.value
        self.dim = padded(problem.head_dim)
        self.queries = padded(problem.queries)
        amounts = problem.amounts
        if amounts is not None and amounts.dtype in (torch.float64, torch.bfloat16):
            amounts = amounts.float()
        # a probability of 0 but for rounding drops nothing
        threshold = round(problem.dropout * 2**32)
        self.inputs = problem._replace(amounts=amounts, seed=problem.seed if threshold else None)[
            : RaggedAttention._fields.index("scale")
        ]
        limit = min(threshold, 2**32) - 1  # as a signed number of the same 32 bits
        bins = len(problem.key_part) if problem.key_part is not None and problem.binned else 0
        self.counts = (
            problem.cells, problem.entries, len(problem.key), bins, problem.queries, problem.heads,
            0 if len(problem.query) == 1 else 1,
        )  # fmt: skip
        self.drop = (limit - 2**32 * (limit >= 2**31), problem.scale, 1 / (1 - problem.dropout))
        wide = (len(problem.key) + 1) * problem.heads * problem.head_dim >= 2**31
        self.dims = {"HEAD_DIM": problem.head_dim, "DIM": self.dim}
        self.constants = self.dims | {"BINNED": problem.binned, "WIDE": wide}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def sum_rows(
        self, rows: Tensor, order: Tensor, offsets: Tensor, sums: Tensor, column: int
    ) -> None:
        """Sums of ``rows`` [n, width] in stretches of ``order``, to columns of ``sums``."""
        segments, (length, width) = len(offsets) - 1, rows.shape
        slots = segments + length // CHUNK.value
        partials = self.empty(slots, width)
        self.run(
            sum_pieces, slots * triton.cdiv(width, SUM_WIDTH), SUM,
            rows, order, offsets, partials, self.faults, segments, length, width,
            TILE=SUM.tile, WIDTH=SUM_WIDTH,
        )  # fmt: skip
        self.sum_slots(partials, offsets, sums, length, column)

    def sum_slots(
        self, partials: Tensor, offsets: Tensor, sums: Tensor, length: int, column: int = 0
    ) -> None:
        """Sums of ``partials`` [slots, width] of each stretch, to columns of ``sums``."""
        segments, width = len(offsets) - 1, partials.shape[1]
        self.run(
            sum_slots, segments * triton.cdiv(width, SUM_WIDTH), SUM,
            partials, offsets, sums, self.faults, segments, length, width, sums.shape[1], column,
            WIDTH=SUM_WIDTH,
        )  # fmt: skip

    def run(
        self, kernel: Any, programs: int, configuration: Configuration, *arguments: Any,
        **constants: Any,
    ) -> None:  # fmt: skip
        launch(self.device, kernel, programs, configuration, *arguments, **constants)
