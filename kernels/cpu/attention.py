"""Patch cross-attention on a CPU.

For patch p, head h and the entries i of a cell (design, "The idea that makes it fast"):

    attended(p, h) = sum_i a_i (V[gene_i, h] + value part) / sum_i a_i
    a_i = exp(q_p · K[gene_i, h]) · exp(q_p · key's value part)

- The first factor depends on the gene alone. It is a row of a table, computed in float64 once
  per set of weights: an entry costs no product of queries and keys and no exponential.
- The second factor depends on the value alone: a table row for binned values, a few rows made
  per cell for integer values, and one exponential per (entry, patch, head) for continuous ones.
- What remains is the sum over entries, a matrix product [value row] x [patches] per head. It
  runs on tiles of `TILE` entries whose weights stay in the first-level cache. A column of ones
  among the value rows makes the denominators part of the same product.

Per entry and at the paper's sizes: 640 bytes gathered (the exponentials and the value row lie
side by side), 128 multiplications for the weights and 2,304 multiply-adds, of which 2,048 are
the product itself, 128 the denominators and 128 fill the register tile.

Ranges. Both factors are taken relative to their largest possible value (over all genes; over the
cell's values) and scaled by 2^`SCALE`, so that neither overflows, and products that matter do
not underflow: what is flushed to zero is below 2^(-126 + SCALE) per entry, against a denominator
of at least 2^-38. Where a denominator is smaller or not finite, that (patch, head) of the cell
is computed again in float64 from the scores, relative to its own maximum (`exact.repair`).

Memory. The table does not fit the second-level cache, and a core takes about 10 GB/s from the
third. So a group of cells passes over the table together, stretch by stretch: each cell sums
those of its entries that lie in the stretch (they are in the order of their tokens; other orders
are right too, only slower), and finds many rows where the cells before it left them. Measured on
one core with real gene frequencies: from 135 to 120 ns per gene in cells of 850 genes, and from
144 to 95 in cells of 16,000.

Sums. Tiles begin at every `TILE`-th entry of a cell, wherever its visits begin and end. A tile is
summed from zero, tiles are added up to chunks of `CHUNK` entries and chunks to the whole, so that
a sum of n entries is at most 32 + 32 + n / 1024 roundings long: worth 8e-6 where n is 70,000, and
the rounding of all were alike. Nothing outside the cell has a part in this, so nothing outside the
cell can influence its bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .dropout import begin_words, count_words, drop_weights
from .exact import repair
from .simd import LANES, TILE_ROWS, multiply_add, prefetch
from .vector_math import (
    add,
    add_scaled,
    divide_where_positive,
    fill,
    multiply,
    poison,
    scale,
    value_factors,
)

F32 = np.float32

TILE = 32  # entries: 16 KiB of weights, 5 KiB of value rows; a first-level cache holds 32 KiB
GROUP = 16  # cells that pass over the table together: 144 KiB of sums
VISIT = 200  # entries of a cell, on average, before the next of its group has its turn
CHUNK = 1024  # entries
INTEGERS = 256  # discrete values are uint8
SCALE = 48
LARGEST_EXPONENT = F32(2.0**21)  # beyond, float32 has no fraction left to work with


@njit(nogil=True)
def cross_attend(
    genes, values, offsets, pads, first_cell, cells, discrete, dropout, tables, scratch
):
    """Sum over the entries of consecutive cells; `finish` turns a cell's sums into its result.

    Parameters
    ----------
    genes, values, offsets, pads
        Borrowed pointers, int32, float32, int64 and float32.
    first_cell, cells
        The cells, at most `GROUP`; cell ``first_cell + slot`` is summed in slot ``slot``.
    discrete
        Whether values are small integers, whose factors are made once per cell.
    dropout
        `dropout.Dropout`: weights are dropped from the sums, but not from the denominators.
    tables, scratch
        Borrowed `tables.Tables` and `tables.Scratch`.
    """
    entries = offsets[first_cell + cells] - offsets[first_cell]
    for slot in range(cells):
        cell = first_cell + slot
        first, last = offsets[cell], offsets[cell + 1]
        scratch.position[slot] = first
        _begin(slot, values, first, last, pads[cell], discrete, tables, scratch)
    stretches = max(1, entries // (cells * VISIT))
    for stretch in range(1, stretches + 1):
        limit = tables.genes * stretch // stretches
        for slot in range(cells):
            _visit(
                slot, genes, values, offsets, first_cell, cells, limit, discrete, dropout, tables,
                scratch,
            )  # fmt: skip


@njit(nogil=True)
def finish(slot, genes, values, first, last, pads, discrete, tables, scratch, attended):
    """Attended values of the cell in ``slot``, float32 [D · lanes], feature-major.

    ``first`` and ``last`` bound the cell's entries; ``pads`` is the number of its padding tokens
    (gene 0, value 0).
    """
    lanes, head_dim = tables.lanes, tables.head_dim
    if pads > 0:
        row = _factor_row(slot, F32(0.0), discrete, tables, scratch)
        _stage(0, F32(0.0), row, 0, tables, scratch)
        scale((F32(pads),), scratch.weights, 0, scratch.weights, 0, tables.heads * lanes)
        _accumulate(slot, 1, genes, last, 0, tables, scratch)
    end_chunk(slot, tables, scratch)
    sums, at = scratch.sums, slot * tables.heads * tables.block * lanes
    for h in range(tables.heads):
        totals = at + (h * tables.block + head_dim) * lanes
        for d in range(head_dim):  # where a sum is not finite, its total shall not look good
            poison((), sums, totals, sums, totals, sums, totals - (d + 1) * lanes, lanes)
    if last > first or pads > 0:
        repair(genes, values, first, last, pads, tables, scratch, at)
    for h in range(tables.heads):
        totals = at + (h * tables.block + head_dim) * lanes
        for d in range(head_dim):
            source, target = at + (h * tables.block + d) * lanes, (h * head_dim + d) * lanes
            divide_where_positive((), attended, target, sums, source, sums, totals, lanes)


@njit(nogil=True, inline="always")
def _begin(slot, values, first, last, pads, discrete, tables, scratch):
    """Clear a slot; fix the power of two that its factors are relative to."""
    size, width = tables.heads * tables.block * tables.lanes, tables.heads * tables.lanes
    for sums in (scratch.partial, scratch.sums):
        fill((F32(0.0),), sums, slot * size, sums, slot * size, size)
    if not tables.binned:
        highest, lowest = F32(0.0), F32(0.0)
        if last > first and pads == 0:
            highest, lowest = values[first], values[first]
        for i in range(first, last):
            highest = max(highest, values[i])
            lowest = min(lowest, values[i])
        for j in range(width):
            slope = tables.slope[j]
            high, low = highest * slope, lowest * slope
            shift = np.rint(max(high, low)) - F32(SCALE)
            if not max(abs(high), abs(low)) < LARGEST_EXPONENT:
                shift = F32(np.inf)  # all factors become 0, and `repair` computes the cell
            scratch.shift[slot * width + j] = shift
        if discrete:
            for value in range(np.int64(highest) + 1):
                _fill_factors(slot, F32(value), value, tables, scratch)


@njit(nogil=True)
def _visit(
    slot, genes, values, offsets, first_cell, cells, limit, discrete, dropout, tables, scratch
):
    """Sum a cell's next tiles, as far as they begin with a gene below ``limit``."""
    first, last = offsets[first_cell + slot], offsets[first_cell + slot + 1]
    position = scratch.position[slot]
    if dropout.threshold > 0:
        for h in range(tables.heads):
            begin_words(
                scratch.words, h * count_words(tables.lanes), dropout, first_cell + slot, h,
                0, tables.patches, tables.patches,
            )  # fmt: skip
    while position < last and genes[position] < limit:
        count = min(TILE, last - position)
        for k in range(count):
            value = values[position + k]
            row = _factor_row(slot, value, discrete, tables, scratch)
            _stage(np.int64(genes[position + k]), value, row, k, tables, scratch)
        if dropout.threshold > 0:
            _drop(slot, position - first, count, dropout, tables, scratch)
        position += count
        next_at, next_last = position, last
        if (position == last or genes[position] >= limit) and slot + 1 < cells:
            next_at, next_last = scratch.position[slot + 1], offsets[first_cell + slot + 2]
        _accumulate(slot, count, genes, next_at, min(TILE, next_last - next_at), tables, scratch)
        if (position - first) % CHUNK == 0:
            end_chunk(slot, tables, scratch)
    scratch.position[slot] = position


@njit(nogil=True)
def end_chunk(slot, tables, scratch):
    """Add the chunk in work to the cell's sums."""
    size = tables.heads * tables.block * tables.lanes
    at, partial, sums = slot * size, scratch.partial, scratch.sums
    add((), sums, at, sums, at, partial, at, size)
    fill((F32(0.0),), partial, at, partial, at, size)


@njit(nogil=True, inline="always")
def _factor_row(slot, value, discrete, tables, scratch):
    """The row of factors that belongs to a value, which for continuous values is made now."""
    if tables.binned:
        return np.int64(value)
    if discrete:
        return slot * INTEGERS + np.int64(value)
    _fill_factors(slot, value, 0, tables, scratch)
    return slot * INTEGERS


@njit(nogil=True, inline="always")
def _fill_factors(slot, value, row, tables, scratch):
    """factors[slot, row] = 2 ** (value · slope - shift[slot])."""
    width = tables.heads * tables.lanes
    value_factors(
        (value,), scratch.factors, (slot * INTEGERS + row) * width,
        tables.slope, 0, tables.slope_rest, 0, scratch.shift, slot * width, width,
    )  # fmt: skip


@njit(nogil=True, inline="always")
def _stage(gene, value, row, k, tables, scratch):
    """Write entry k's weights [h, p] and its value rows [h, d], each followed by a one."""
    heads, head_dim, block = tables.heads, tables.head_dim, tables.block
    width, rows = heads * tables.lanes, scratch.rows
    source, place = gene * tables.row, k * heads * block
    factors = tables.value_factors if tables.binned else scratch.factors
    multiply((), scratch.weights, k * width, tables.table, source, factors, row * width, width)
    source += width
    part = row * tables.dim if tables.binned else 0
    for _ in range(heads):
        # whole vectors: what is written beyond head_dim is overwritten by what follows
        if tables.binned:
            add((), rows, place, tables.table, source, tables.value_rows, part, head_dim)
        else:
            add_scaled(
                (value,), rows, place, tables.value_rows, part, tables.table, source, head_dim
            )
        rows[place + head_dim] = F32(1.0)
        source, place, part = source + head_dim, place + block, part + head_dim


@njit(nogil=True)
def _drop(slot, entry, count, dropout, tables, scratch):
    """Add the staged weights to the denominators, then drop some: from ``entry`` of the cell on."""
    lanes, heads, block, head_dim = tables.lanes, tables.heads, tables.block, tables.head_dim
    width, words, rows = heads * lanes, count_words(lanes), scratch.rows
    for h in range(heads):
        one = h * block + head_dim  # of each entry's rows
        multiply_add(
            scratch.partial, ((slot * heads + h) * block + head_dim) * lanes, lanes, 1, lanes,
            rows, one, 1, heads * block, scratch.weights, h * lanes, width, count,
        )  # fmt: skip
        for k in range(count):
            rows[one + k * heads * block] = F32(0.0)  # what is dropped has been counted
    for k in range(count):
        for h in range(heads):
            at = k * width + h * lanes
            drop_weights(
                scratch.weights, at, scratch.weights, at,
                scratch.words, h * words, entry + k, lanes, dropout,
            )  # fmt: skip


@njit(nogil=True, inline="always")
def _accumulate(slot, count, genes, first, ahead, tables, scratch):
    """partial[slot, h] += rows[:, h]ᵀ · weights[:, h] over ``count`` staged entries.

    Meanwhile the table rows of the ``ahead`` entries from ``first`` on are fetched, a part
    beside each block of rows, so that memory works while the multipliers do.
    """
    lanes, heads, block = tables.lanes, tables.heads, tables.block
    parts, sums = heads * block // TILE_ROWS, slot * heads * block * lanes
    for part in range(parts):
        for k in range(first + part * ahead // parts, first + (part + 1) * ahead // parts):
            start = np.int64(genes[k]) * tables.row
            for j in range(0, tables.row, LANES):
                prefetch(tables.table, start + j)
        h = part * TILE_ROWS // block
        multiply_add(
            scratch.partial, sums + part * TILE_ROWS * lanes, lanes, TILE_ROWS, lanes,
            scratch.rows, part * TILE_ROWS, 1, heads * block,
            scratch.weights, h * lanes, heads * lanes,
            count,
        )  # fmt: skip
