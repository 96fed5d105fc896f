"""What the CPU kernels read: the projected tables of one set of weights, and scratch memory.

Everything is projected in float64 and rounded once. For 60,000 genes at the paper's sizes the
table of exponentials and value rows takes 38 MB and the float64 keys, which only the repair of
underflows and the attention weights read, 15 MB; making them takes about 0.2 s.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from .. import reference
from ..threads import run_blocks
from ..weights import EncoderWeights
from .attention import GROUP, INTEGERS, SCALE, TILE
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


def make_scratch(tables: Tables) -> Scratch:
    width = tables.heads * tables.lanes
    return Scratch(
        aligned(TILE * width),
        aligned(TILE * tables.heads * tables.block + LANES),
        *(aligned(GROUP * tables.heads * tables.block * tables.lanes) for _ in range(2)),
        aligned(GROUP * INTEGERS * width),
        aligned(GROUP * width),
        np.empty(GROUP, np.int64),
    )


def make_tables(weights: EncoderWeights) -> Tables:
    """Project the tables of ``weights``."""
    exact = EncoderWeights(*(_double(field) for field in weights))
    queries, keys, values = (t.numpy() for t in reference.project_tables(exact))
    patches, heads, head_dim = queries.shape
    lanes = -(-patches // LANES) * LANES
    queries = np.ascontiguousarray(queries.transpose(1, 2, 0))  # [h, d, p]
    queries = np.pad(queries, ((0, 0), (0, 0), (0, lanes - patches)))
    value_scores, value_rows, constant = _value_tables(exact, queries)
    binned = exact.value_bins is not None

    dim, width = heads * head_dim, heads * lanes
    memory = aligned(len(keys) * (width + dim) + LANES)  # read in whole vectors
    table = memory[:-LANES].reshape(len(keys), width + dim)
    highest = _highest_scores(queries, keys)
    run_blocks(
        lambda start, stop: _fill_table(table, queries, keys, highest, start, stop), len(keys), 4096
    )
    table[:, width:] = values.reshape(-1, dim) + constant

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


def _double(field: Any) -> Any:
    """The same weights in float64, without gradients, on the CPU."""
    if isinstance(field, torch.Tensor):
        return field.detach().double().cpu()
    if isinstance(field, tuple):
        parts = [_double(part) for part in field]
        return type(field)(*parts) if hasattr(field, "_fields") else tuple(parts)
    return field


def _value_tables(
    weights: EncoderWeights, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and value rows of bins, or of the affine slope, and the constant of the value rows.

    The affine intercept is a constant of every key, which cancels in the softmax, and of every
    value row, which is added to the table.
    """
    bins = 2 if weights.value_bins is None else len(weights.value_bins)
    keys, rows = (t.numpy() for t in reference.project_values(weights, torch.arange(bins)))
    constant = np.zeros(keys[0].size)
    if weights.value_bins is None:
        constant = rows[0].reshape(-1)
        keys, rows = keys[1:] - keys[:1], rows[1:] - rows[:1]
    return np.einsum("bhd,hdp->bhp", keys, queries), rows, constant


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
