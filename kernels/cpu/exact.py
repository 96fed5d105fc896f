"""Cross-attention from the scores themselves, in float64: slow, and right for any scores.

Two uses: to repair the (cell, patch, head)s whose factorised weights under- or overflow, and to
give attention weights to those who ask for them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

F32 = np.float32
NEGLIGIBLE = -60.0  # 70,000 times e^-60 is 6e-22
SMALLEST_TOTAL, LARGEST_TOTAL = F32(2.0**-38), F32(2.0**114)  # see attention.py, "Ranges"


@njit(nogil=True, error_model="numpy")
def repair(genes, values, first, last, pads, tables, scratch, at):
    """Compute again what under- or overflowed in scratch.sums[at:], one cell's [h, block, lanes].

    ``first`` and ``last`` bound the cell's entries, of which there is at least one, or a pad.
    """
    lanes, head_dim, sums = tables.lanes, tables.head_dim, scratch.sums
    wrong, scores, highest, totals = scratch.wrong, scratch.scores, scratch.highest, scratch.totals
    for h in range(tables.heads):
        place = at + (h * tables.block + head_dim) * lanes
        count = 0
        for p in range(tables.patches):
            if not SMALLEST_TOTAL <= sums[place + p] <= LARGEST_TOTAL:
                wrong[count] = p
                count += 1
        if count == 0:
            continue
        _find_highest(genes, values, first, last, pads, h, tables, scratch)
        for j in range(lanes * head_dim):
            scratch.exact[j] = 0.0
        for i in range(first, last + (pads > 0)):
            gene, value, number = _entry(genes, values, last, pads, i)
            _score_patches(gene, value, h, tables, scores)
            _value_row(gene, value, h, tables, scratch.row)
            for j in range(count):
                p = wrong[j]
                if scores[p] - highest[p] < NEGLIGIBLE:
                    continue
                weight = number * math.exp(scores[p] - highest[p])
                totals[p] += weight
                for d in range(head_dim):
                    scratch.exact[p * head_dim + d] += weight * scratch.row[d]
        for j in range(count):
            p = wrong[j]
            for d in range(head_dim):
                quotient = scratch.exact[p * head_dim + d] / totals[p]
                sums[at + (h * tables.block + d) * lanes + p] = F32(quotient)
            sums[place + p] = F32(1.0)


@njit(nogil=True, error_model="numpy")
def weigh_entries(batch, first, last, cell, tables, scratch):
    """Write the attention weights of a cell's entries and pads."""
    heads, patches, pads = tables.heads, tables.patches, batch.pads[cell]
    scores, highest, totals = scratch.scores, scratch.highest, scratch.totals
    for h in range(heads):
        pad_place = (cell * heads + h) * patches
        for p in range(patches):
            batch.pad_attention[pad_place + p] = F32(0.0)
        _find_highest(batch.genes, batch.values, first, last, pads, h, tables, scratch)
        for i in range(first, last + (pads > 0)):
            gene, value, number = _entry(batch.genes, batch.values, last, pads, i)
            _score_patches(gene, value, h, tables, scores)
            for p in range(patches):
                totals[p] += number * math.exp(scores[p] - highest[p])
        for i in range(first, last + (pads > 0)):
            gene, value, number = _entry(batch.genes, batch.values, last, pads, i)
            _score_patches(gene, value, h, tables, scores)
            for p in range(patches):
                weight = F32(number * math.exp(scores[p] - highest[p]) / totals[p])
                if i < last:
                    batch.cross_attention[(i * heads + h) * patches + p] = weight
                else:
                    batch.pad_attention[pad_place + p] = weight


@njit(nogil=True)
def _find_highest(genes, values, first, last, pads, h, tables, scratch):
    """The largest score of each patch over a cell's entries and pads; clears the totals."""
    scores, highest = scratch.scores, scratch.highest
    for p in range(tables.lanes):
        highest[p] = -math.inf
        scratch.totals[p] = 0.0
    for i in range(first, last + (pads > 0)):
        gene, value, _ = _entry(genes, values, last, pads, i)
        _score_patches(gene, value, h, tables, scores)
        for p in range(tables.lanes):
            highest[p] = max(highest[p], scores[p])


@njit(nogil=True, inline="always")
def _entry(genes, values, last, pads, i):
    """(gene, value, how often) of entry i; the entry after the last stands for the pads."""
    if i < last:
        return np.int64(genes[i]), values[i], 1.0
    return np.int64(0), F32(0.0), float(pads)


@njit(nogil=True)
def _score_patches(gene, value, h, tables, scores):
    """scores[p] = q_p · (K[gene] + key's value part) of head h, without the constant."""
    lanes, queries = tables.lanes, tables.queries
    part, factor = h * lanes, np.float64(value)
    if tables.binned:
        part, factor = (np.int64(value) * tables.heads + h) * lanes, np.float64(1.0)
    for p in range(lanes):
        scores[p] = factor * tables.value_scores[part + p]
    for d in range(h * tables.head_dim, (h + 1) * tables.head_dim):
        key = tables.keys[gene * tables.dim + d]
        for p in range(lanes):
            scores[p] += key * queries[d * lanes + p]


@njit(nogil=True)
def _value_row(gene, value, h, tables, row):
    """row[d] = V[gene] + value part, of head h."""
    at = h * tables.head_dim
    source = gene * tables.row + tables.heads * tables.lanes + at
    part, factor = at, np.float64(value)
    if tables.binned:
        part, factor = np.int64(value) * tables.dim + at, np.float64(1.0)
    for d in range(tables.head_dim):
        row[d] = tables.table[source + d] + factor * tables.value_rows[part + d]
