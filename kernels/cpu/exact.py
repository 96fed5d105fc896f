"""Cross-attention from the scores themselves, in float64: slow, and right for any scores.

Two uses: to repair the (cell, patch, head)s whose factorised weights under- or overflow, and to
give attention weights to those who ask for them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

F32 = np.float32
SMALLEST_TOTAL, LARGEST_TOTAL = F32(2.0**-38), F32(2.0**114)  # see attention.py, "Ranges"


@njit(nogil=True)
def repair(genes, values, first, last, pads, tables, sums, at):
    """Compute again what under- or overflowed: sums[at:] of one cell, [h, block, lanes]."""
    lanes, head_dim = tables.lanes, tables.head_dim
    for h in range(tables.heads):
        totals = at + (h * tables.block + head_dim) * lanes
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
                sums[at + (h * tables.block + d) * lanes + p] = F32(exact[d])
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


@njit(nogil=True)
def weigh_entries(batch, first, last, cell, tables):
    """Attention weights of a cell's entries and pads, computed in float64."""
    heads, patches, pads = tables.heads, tables.patches, batch.pads[cell]
    for h in range(heads):
        for p in range(patches):
            if pads == 0:
                batch.pad_attention[(cell * heads + h) * patches + p] = np.float32(0.0)
            if last == first and pads == 0:
                continue
            log_total = log_sum_exp(batch.genes, batch.values, first, last, pads, h, p, tables)
            for i in range(first, last + (pads > 0)):
                gene, value, number = entry(batch.genes, batch.values, last, pads, i)
                weight = number * math.exp(score(gene, value, h, p, tables) - log_total)
                if i < last:
                    batch.cross_attention[(i * heads + h) * patches + p] = np.float32(weight)
                else:
                    place = (cell * heads + h) * patches + p
                    batch.pad_attention[place] = np.float32(weight)
