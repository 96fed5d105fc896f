"""What the CPU kernels read: the projected tables of one set of weights, and scratch memory.

Everything is projected in float64 and rounded once. For 60,000 genes at the paper's sizes the
table of exponentials and value rows takes 38 MB and the float64 keys, which only the repair of
underflows and the attention weights read, 15 MB; making them takes about 0.2 s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from ..threads import run_blocks
from ..weights import EncoderWeights
from .attention import GROUP, INTEGERS, SCALE, TILE
from .dropout import make_words
from .simd import LANES, TILE_ROWS, aligned


class Tables(NamedTuple):
    """Projected tables; ``lanes`` is the number of patches rounded up to whole vectors."""

    genes: int
    patches: int
    lanes: int
    heads: int
    head_dim: int
    dim: int  # heads · head_dim
    block: int  # rows of sums per head: head_dim, then the denominator, filled to a tile
    row: int  # floats per gene in table
    binned: bool
    table: np.ndarray  # float32 [g · row]: exp(q·K - max over genes) · 2^SCALE, then V
    value_factors: np.ndarray  # float32 [bins · h · lanes]: the same for bins; empty if affine
    value_rows: np.ndarray  # float32 [bins · D], or [D]: the slope w of an affine value part
    slope: np.ndarray  # float32 [h · lanes]: affine value part of the score, in powers of two
    slope_rest: np.ndarray  # float32 [h · lanes]: what rounding took from the slope
    keys: np.ndarray  # float64 [g · h · d]
    queries: np.ndarray  # float64 [h · d · lanes]
    value_scores: np.ndarray  # float64 [bins or 1 · h · lanes]


class Scratch(NamedTuple):
    """Memory of one thread."""

    weights: np.ndarray  # float32 [TILE · h · lanes]
    rows: np.ndarray  # float32 [TILE · h · block + LANES]
    partial: np.ndarray  # float32 [GROUP · h · block · lanes]: of the chunk in work
    sums: np.ndarray  # float32, likewise: of the chunks before
    factors: np.ndarray  # float32 [GROUP · INTEGERS · h · lanes]
    shift: np.ndarray  # float32 [GROUP · h · lanes]
    position: np.ndarray  # int64 [GROUP]: the next entry of each cell
    # of `dropout`
    words: np.ndarray  # int64 [h · count_words]
    # of `exact`, for one head; float64 but for the first
    wrong: np.ndarray  # int64 [lanes]: patches to compute again
    scores: np.ndarray  # [lanes]
    highest: np.ndarray  # [lanes]
    totals: np.ndarray  # [lanes]
    exact: np.ndarray  # [lanes · d]
    row: np.ndarray  # [d]


def make_scratch(tables: Tables) -> Scratch:
    width = tables.heads * tables.lanes
    sums = GROUP * tables.heads * tables.block * tables.lanes
    return Scratch(
        weights=aligned(TILE * width),
        rows=aligned(TILE * tables.heads * tables.block + LANES),
        partial=aligned(sums),
        sums=aligned(sums),
        factors=aligned(GROUP * INTEGERS * width),
        shift=aligned(GROUP * width),
        position=np.empty(GROUP, np.int64),
        words=make_words(tables.lanes, tables.heads),
        wrong=np.empty(tables.lanes, np.int64),
        scores=np.empty(tables.lanes),
        highest=np.empty(tables.lanes),
        totals=np.empty(tables.lanes),
        exact=np.empty(tables.lanes * tables.head_dim),
        row=np.empty(tables.head_dim),
    )


def make_tables(weights: EncoderWeights) -> Tables:
    """Project the tables of ``weights``."""
    heads, binned = weights.heads, weights.value_bins is not None
    query_weight, key_weight, value_weight = np.split(_exact(weights.cross.in_weight), 3)
    query_bias, _, value_bias = np.split(_exact(weights.cross.in_bias), 3)
    dim = len(query_bias)
    head_dim, patches = dim // heads, len(weights.patches)
    lanes = -(-patches // LANES) * LANES

    queries = (_project(_exact(weights.patches), query_weight) + query_bias) / math.sqrt(head_dim)
    queries = queries.reshape(patches, heads, head_dim).transpose(1, 2, 0)  # [h, d, p]
    queries = np.pad(queries, ((0, 0), (0, 0), (0, lanes - patches)))
    keys = _project(_exact(weights.genes), key_weight).reshape(-1, heads, head_dim)
    rows = _project(_exact(weights.genes), value_weight)  # [g, D]

    # A constant of all keys cancels in the softmax. One of all value rows is added to the table.
    embedded = _exact(weights.value_bins if binned else weights.value_weight).reshape(-1, dim)
    value_keys = _project(embedded, key_weight).reshape(-1, heads, head_dim)
    value_rows = _project(embedded, value_weight)  # [bins or 1, D]
    rows += value_bias
    if not binned:
        rows += _project(_exact(weights.value_bias).reshape(1, dim), value_weight)
    value_scores = np.empty((len(embedded), heads, lanes))
    for value in range(len(embedded)):
        _scores(value, queries, value_keys, value_scores[value])

    width = heads * lanes
    memory = aligned(len(keys) * (width + dim) + LANES)  # read in whole vectors
    table = memory[:-LANES].reshape(len(keys), width + dim)
    highest = _highest_scores(queries, keys)
    run_blocks(
        lambda start, stop: _fill_table(table, queries, keys, highest, start, stop), len(keys), 4096
    )
    table[:, width:] = rows

    factors = np.exp(value_scores - value_scores.max(0)) * 2.0**SCALE
    slope = (value_scores[0] * math.log2(math.e)).reshape(-1)
    return Tables(
        genes=len(keys),
        patches=patches,
        lanes=lanes,
        heads=heads,
        head_dim=head_dim,
        dim=dim,
        block=-(-(head_dim + 1) // TILE_ROWS) * TILE_ROWS,
        row=width + dim,
        binned=binned,
        table=memory,
        value_factors=factors.astype(np.float32).reshape(-1),
        value_rows=np.pad(value_rows.astype(np.float32).reshape(-1), (0, LANES)),
        slope=slope.astype(np.float32),
        slope_rest=(slope - slope.astype(np.float32)).astype(np.float32),
        keys=keys.reshape(-1),
        queries=queries.reshape(-1),
        value_scores=value_scores.reshape(-1),
    )


def _exact(tensor: torch.Tensor | None) -> np.ndarray:
    """float64, contiguous, on the CPU."""
    assert tensor is not None
    return np.ascontiguousarray(tensor.detach().double().cpu().numpy())


@njit(nogil=True, cache=True)
def _project(rows, weight):
    """rows [n, k] · weight [m, k]ᵀ in float64.

    Each sum is in the order of k: a library's product may choose its order by the machine and
    the number of threads, and a cell's embedding would depend on them.
    """
    transposed = weight.T.copy()
    projected = np.zeros((len(rows), len(weight)))
    for n in range(len(rows)):
        for k in range(rows.shape[1]):
            factor = rows[n, k]
            for m in range(len(weight)):
                projected[n, m] += factor * transposed[k, m]
    return projected


@njit(nogil=True, cache=True)
def _scores(gene, queries, keys, scores):
    """scores[h, p] = q_p · keys[gene], float64."""
    heads, head_dim, lanes = queries.shape
    for h in range(heads):
        for p in range(lanes):
            scores[h, p] = 0.0
        for d in range(head_dim):
            key = keys[gene, h, d]
            for p in range(lanes):
                scores[h, p] += key * queries[h, d, p]


@njit(nogil=True, cache=True)
def _highest_scores(queries, keys):
    """The largest score of any gene, [h, p]."""
    heads, _, lanes = queries.shape
    scores, highest = np.empty((heads, lanes)), np.full((heads, lanes), -np.inf)
    for gene in range(len(keys)):
        _scores(gene, queries, keys, scores)
        highest = np.maximum(highest, scores)
    return highest


@njit(nogil=True, cache=True)
def _fill_table(table, queries, keys, highest, start, stop):
    """Write exp(score - highest) · 2^SCALE for genes start to stop."""
    heads, _, lanes = queries.shape
    scores = np.empty((heads, lanes))
    for gene in range(start, stop):
        _scores(gene, queries, keys, scores)
        for h in range(heads):
            for p in range(lanes):
                relative = math.exp(scores[h, p] - highest[h, p])
                table[gene, h * lanes + p] = np.float32(relative * 2.0**SCALE)
