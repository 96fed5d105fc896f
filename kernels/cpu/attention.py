"""Patch cross-attention of one cell at a time, on a CPU.

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
of at least 2^-38 (`SMALLEST_TOTAL`). Where a denominator is smaller or not finite, that (patch,
head) of the cell is computed again in float64 from the scores, relative to its own maximum.

A cell is computed by one thread from its first entry to its last, so nothing outside the cell
can influence its bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from .simd import LANES, TILE_ROWS, multiply_add, prefetch
from .vector_math import (
    add,
    add_scaled,
    divide_where_positive,
    fill,
    multiply,
    scale,
    value_factors,
)

F32 = np.float32

TILE = 32  # entries: 16 KiB of weights, 5 KiB of value rows; a first-level cache holds 32 KiB
SCALE = 48
SMALLEST_TOTAL = F32(2.0**-38)
LARGEST_TOTAL = F32(2.0**114)


@njit(nogil=True)
def cross_attend(genes, values, first, last, discrete, pads, tables, scratch, attended):
    """Attend over the entries ``first`` to ``last``. All arrays are borrowed pointers.

    Parameters
    ----------
    genes, values
        int32 and float32 [entries].
    discrete
        Whether values are small integers, whose factors are made once per cell.
    pads
        float: number of padding tokens (gene 0, value 0).
    tables, scratch
        `tables.Tables` and `tables.Scratch`.
    attended
        float32 [D · lanes], written: feature-major, patches side by side.
    """
    sums = scratch.sums
    fill((F32(0.0),), sums, 0, sums, 0, tables.heads * tables.block * tables.lanes)
    factors = tables.value_factors if tables.binned else scratch.factors
    _prepare_cell(values, first, last, discrete, pads, tables, scratch)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        for k in range(count):
            value = values[start + k]
            row = _factor_row(value, discrete, tables, scratch)
            _stage(np.int64(genes[start + k]), value, row, k, tables, scratch, factors)
        ahead = min(TILE, last - start - count)
        _accumulate(count, genes, start + count, ahead, tables, scratch)
    if pads > 0:
        row = _factor_row(F32(0.0), discrete, tables, scratch)
        _stage(0, F32(0.0), row, 0, tables, scratch, factors)
        scale((F32(pads),), scratch.weights, 0, scratch.weights, 0, tables.heads * tables.lanes)
        _accumulate(1, genes, last, 0, tables, scratch)
    if last > first or pads > 0:
        _repair(genes, values, first, last, pads, tables, sums)
    _divide(tables, sums, attended)


@njit(nogil=True, inline="always")
def _prepare_cell(values, first, last, discrete, pads, tables, scratch):
    """Fix the power of two that the cell's factors are relative to; make rows for integers."""
    if tables.binned:
        return
    highest = F32(0.0)
    lowest = F32(np.inf) if pads == 0 else F32(0.0)
    for i in range(first, last):
        highest = max(highest, values[i])
        lowest = min(lowest, values[i])
    if lowest == F32(np.inf):
        lowest = F32(0.0)
    for j in range(tables.heads * tables.lanes):
        slope = tables.slope[j]
        scratch.shift[j] = np.rint(max(highest * slope, lowest * slope)) - F32(SCALE)
    if discrete:
        for value in range(np.int64(highest) + 1):
            _fill_factors(F32(value), value, tables, scratch)


@njit(nogil=True, inline="always")
def _factor_row(value, discrete, tables, scratch):
    """The row of factors that belongs to a value, which for continuous values is made now."""
    if discrete:
        return np.int64(value)
    _fill_factors(value, 0, tables, scratch)
    return 0


@njit(nogil=True, inline="always")
def _fill_factors(value, row, tables, scratch):
    """factors[row] = 2 ** (value · slope - shift)."""
    width = tables.heads * tables.lanes
    value_factors(
        (value,), scratch.factors, row * width,
        tables.slope, 0, tables.slope_rest, 0, scratch.shift, 0, width,
    )  # fmt: skip


@njit(nogil=True, inline="always")
def _stage(gene, value, row, k, tables, scratch, factors):
    """Write entry k's weights [h, p] and its value rows [h, d], each followed by a one."""
    heads, head_dim, block = tables.heads, tables.head_dim, tables.block
    width, rows = heads * tables.lanes, scratch.rows
    source, place = gene * tables.row, k * heads * block
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


@njit(nogil=True, inline="always")
def _accumulate(count, genes, first, ahead, tables, scratch):
    """sums[h] += rows[:, h]ᵀ · weights[:, h] over ``count`` staged entries.

    Meanwhile the table rows of the ``ahead`` entries from ``first`` on are fetched, a part
    beside each block of rows, so that memory works while the multipliers do.
    """
    lanes, heads, block = tables.lanes, tables.heads, tables.block
    parts = heads * block // TILE_ROWS
    for part in range(parts):
        for k in range(first + part * ahead // parts, first + (part + 1) * ahead // parts):
            start = np.int64(genes[k]) * tables.row
            for j in range(0, tables.row, LANES):
                prefetch(tables.table, start + j)
        h = part * TILE_ROWS // block
        multiply_add(
            scratch.sums, part * TILE_ROWS * lanes, lanes, TILE_ROWS, lanes,
            scratch.rows, part * TILE_ROWS, 1, heads * block,
            scratch.weights, h * lanes, heads * lanes,
            count,
        )  # fmt: skip


@njit(nogil=True, inline="always")
def _divide(tables, sums, attended):
    """attended = sums / totals; 0 where there is nothing to attend to."""
    lanes, head_dim = tables.lanes, tables.head_dim
    for h in range(tables.heads):
        totals = (h * tables.block + head_dim) * lanes
        for d in range(head_dim):
            source, target = (h * tables.block + d) * lanes, (h * head_dim + d) * lanes
            divide_where_positive((), attended, target, sums, source, sums, totals, lanes)


@njit(nogil=True)
def _repair(genes, values, first, last, pads, tables, sums):
    """Compute again what under- or overflowed, in float64 relative to its own maximum."""
    lanes, head_dim = tables.lanes, tables.head_dim
    for h in range(tables.heads):
        totals = (h * tables.block + head_dim) * lanes
        for p in range(tables.patches):
            if SMALLEST_TOTAL <= sums[totals + p] <= LARGEST_TOTAL:
                continue
            exact = np.zeros(head_dim)
            log_total = log_sum_exp(genes, values, first, last, pads, h, p, tables)
            for i in range(first, last + (pads > 0)):
                gene, value, number = entry(genes, values, last, pads, i)
                weight = number * math.exp(score(gene, value, h, p, tables) - log_total)
                for d in range(head_dim):
                    exact[d] += weight * _value_row(gene, value, h, d, tables)
            for d in range(head_dim):
                sums[(h * tables.block + d) * lanes + p] = F32(exact[d])
            sums[totals + p] = F32(1.0)


@njit(nogil=True, inline="always")
def entry(genes, values, last, pads, i):
    """(gene, value, how often) of entry i; the entry after the last stands for the pads."""
    if i < last:
        return np.int64(genes[i]), values[i], 1.0
    return np.int64(0), F32(0.0), float(pads)


@njit(nogil=True)
def score(gene, value, h, p, tables):
    """q_p · (K[gene] + key's value part) of head h in float64, without its constant."""
    keys, queries = tables.keys, tables.queries
    total = 0.0
    for d in range(tables.head_dim):
        at = h * tables.head_dim + d
        total += queries[at * tables.lanes + p] * keys[gene * tables.dim + at]
    at = h * tables.lanes + p
    if tables.binned:
        return total + tables.value_scores[np.int64(value) * tables.heads * tables.lanes + at]
    return total + np.float64(value) * tables.value_scores[at]


@njit(nogil=True)
def log_sum_exp(genes, values, first, last, pads, h, p, tables):
    """log of the sum over entries (and pads) of exp(score), in float64."""
    highest, total = -math.inf, 0.0
    for i in range(first, last + (pads > 0)):
        gene, value, number = entry(genes, values, last, pads, i)
        s = score(gene, value, h, p, tables)
        if s > highest:
            total *= math.exp(highest - s) if total > 0.0 else 0.0
            highest = s
        total += number * math.exp(s - highest)
    return highest + math.log(total)


@njit(nogil=True, inline="always")
def _value_row(gene: Any, value: Any, h: Any, d: Any, tables: Any) -> Any:
    """Element (h, d) of an entry's value row."""
    width = tables.heads * tables.lanes
    at = h * tables.head_dim + d
    row = tables.table[gene * tables.row + width + at]
    if tables.binned:
        return row + tables.value_rows[np.int64(value) * tables.dim + at]
    return row + value * tables.value_rows[at]
