"""The encoder after the cross-attention: everything a cell's 64 x 32 tile goes through.

A cell's state is kept feature-major, [feature, patch], with the patches side by side in vectors.
Then every matrix product is "weights times rows of patches", attention among patches needs no
transposition, and norms and softmaxes run down columns without crossing lanes, so their order
of summation is fixed. At the paper's sizes a cell takes 1.9 million multiply-adds here, about as
much as cross-attention over 900 genes, and all of it stays in the first two caches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from ..reference import LAYER_NORM_EPSILON
from ..weights import BlockWeights, EncoderWeights
from .simd import LANES, aligned, multiply_add
from .vector_math import (
    add,
    add_constant,
    add_squared_difference,
    divide_where_positive,
    exp_difference,
    fill,
    gelu,
    inverse_deviation,
    larger,
    normalise,
    scale,
)

F32 = np.float32
_EPSILON = F32(LAYER_NORM_EPSILON)


class Blocks(NamedTuple):
    """Weights of the cross-attention block, then of the self-attention blocks, stacked flat."""

    depth: int  # blocks
    heads: int
    dim: int
    mlp_dim: int
    patches: int
    lanes: int
    output_dim: int
    projected: bool
    start: np.ndarray  # float32 [D · lanes]: the patch tokens, feature-major
    in_weight: np.ndarray  # float32 [depth · 3 D · D]
    in_bias: np.ndarray
    out_weight: np.ndarray  # [depth · D · D]
    out_bias: np.ndarray
    attention_norm_weight: np.ndarray
    attention_norm_bias: np.ndarray
    up_weight: np.ndarray  # [depth · M · D]
    up_bias: np.ndarray
    down_weight: np.ndarray  # [depth · D · M]
    down_bias: np.ndarray
    mlp_norm_weight: np.ndarray
    mlp_norm_bias: np.ndarray
    projection_weight: np.ndarray  # [E · D], empty without projection
    projection_bias: np.ndarray


class BlockScratch(NamedTuple):
    """Memory of one thread; each [rows · lanes]."""

    state: np.ndarray  # D rows: the residual stream
    mixed: np.ndarray  # D rows: what attention returns
    projected: np.ndarray  # 3 D rows: queries, keys, values
    scores: np.ndarray  # patches rows
    inner: np.ndarray  # M rows
    output: np.ndarray  # E rows
    mean: np.ndarray  # 1 row
    spread: np.ndarray  # 1 row


def make_blocks(weights: EncoderWeights) -> Blocks:
    """Copy the weights into the layout of the kernels, float32.

    Raises
    ------
    ValueError
        If blocks differ in shape.
    """
    blocks = (weights.cross, *weights.self_blocks)
    for block in blocks:
        for name, tensor, first in zip(block._fields, block, weights.cross, strict=True):
            if tensor.shape != first.shape:
                raise ValueError(
                    f"the numba backend needs blocks of one shape: {name} is "
                    f"{list(first.shape)} in one and {list(tensor.shape)} in another"
                )
    patches, dim = weights.patches.shape
    lanes = -(-patches // LANES) * LANES
    start = np.zeros((dim, lanes), np.float32)
    start[:, :patches] = _floats(weights.patches).T
    stacked = {
        name: np.concatenate([_floats(getattr(block, name)).reshape(-1) for block in blocks])
        for name in BlockWeights._fields
    }
    return Blocks(
        depth=len(blocks),
        heads=weights.heads,
        dim=dim,
        mlp_dim=len(weights.cross.up_bias),
        patches=patches,
        lanes=lanes,
        output_dim=weights.output_dim,
        projected=weights.projection_weight is not None,
        start=start.reshape(-1),
        projection_weight=np.zeros(0, np.float32)
        if weights.projection_weight is None
        else _floats(weights.projection_weight).reshape(-1),
        projection_bias=np.zeros(weights.output_dim, np.float32)
        if weights.projection_bias is None
        else _floats(weights.projection_bias),
        **stacked,
    )


def make_block_scratch(blocks: Blocks) -> BlockScratch:
    rows = (
        blocks.dim, blocks.dim, 3 * blocks.dim, blocks.patches, blocks.mlp_dim,
        blocks.output_dim, 1, 1,
    )  # fmt: skip
    return BlockScratch(*(aligned(count * blocks.lanes) for count in rows))


def _floats(tensor: Tensor) -> np.ndarray:
    """float32, contiguous."""
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


@njit(nogil=True)
def run_blocks_of_cell(blocks, scratch, attention, attention_at, keep_attention):
    """From the attended values in ``scratch.mixed`` to the patch features in ``scratch.output``.

    ``attention`` receives the self-attention weights [block, h, p, p] from ``attention_at`` on
    if ``keep_attention``.
    """
    size = blocks.dim * blocks.lanes
    scale((F32(1.0),), scratch.state, 0, blocks.start, 0, size)
    _finish_block(0, blocks, scratch)
    for block in range(1, blocks.depth):
        at = attention_at + (block - 1) * blocks.heads * blocks.patches * blocks.patches
        _attend_to_patches(block, blocks, scratch, attention, at, keep_attention)
        _finish_block(block, blocks, scratch)
    if blocks.projected:
        _linear(
            blocks.projection_weight, 0, blocks.projection_bias, 0, blocks.output_dim, blocks.dim,
            scratch.state, scratch.output, blocks.lanes,
        )  # fmt: skip
    else:
        scale((F32(1.0),), scratch.output, 0, scratch.state, 0, size)


@njit(nogil=True)
def _linear(weight, weight_at, bias, bias_at, rows, count, x, out, lanes):
    """out[rows, lanes] = bias + weight[rows, count] · x[count, lanes]."""
    for i in range(rows):
        fill((bias[bias_at + i],), out, i * lanes, out, i * lanes, lanes)
    multiply_add(out, 0, lanes, rows, lanes, weight, weight_at, count, 1, x, 0, lanes, count)


@njit(nogil=True)
def _add_linear(weight, weight_at, bias, bias_at, rows, count, x, out, lanes):
    """out[rows, lanes] += bias + weight[rows, count] · x[count, lanes]."""
    for i in range(rows):
        add_constant((bias[bias_at + i],), out, i * lanes, out, i * lanes, lanes)
    multiply_add(out, 0, lanes, rows, lanes, weight, weight_at, count, 1, x, 0, lanes, count)


@njit(nogil=True, inline="always")
def _finish_block(block, blocks, scratch):
    """Output projection, residual, norm, MLP, residual, norm; state is updated in place."""
    dim, mlp_dim, lanes = blocks.dim, blocks.mlp_dim, blocks.lanes
    state, inner, at = scratch.state, scratch.inner, block * dim
    _add_linear(
        blocks.out_weight, at * dim, blocks.out_bias, at, dim, dim, scratch.mixed, state, lanes
    )
    _layer_norm(blocks.attention_norm_weight, blocks.attention_norm_bias, at, blocks, scratch)
    _linear(
        blocks.up_weight, at * mlp_dim, blocks.up_bias, block * mlp_dim, mlp_dim, dim,
        state, inner, lanes,
    )  # fmt: skip
    gelu((), inner, 0, inner, 0, mlp_dim * lanes)
    _add_linear(
        blocks.down_weight, at * mlp_dim, blocks.down_bias, at, dim, mlp_dim, inner, state, lanes
    )
    _layer_norm(blocks.mlp_norm_weight, blocks.mlp_norm_bias, at, blocks, scratch)


@njit(nogil=True)
def _layer_norm(weight, bias, at, blocks, scratch):
    """Normalise each patch over its features, in place."""
    dim, lanes, state = blocks.dim, blocks.lanes, scratch.state
    mean, spread = scratch.mean, scratch.spread
    fill((F32(0.0),), mean, 0, mean, 0, lanes)
    for k in range(dim):
        add((), mean, 0, mean, 0, state, k * lanes, lanes)
    scale((F32(1.0 / dim),), mean, 0, mean, 0, lanes)
    fill((F32(0.0),), spread, 0, spread, 0, lanes)
    for k in range(dim):
        add_squared_difference((), spread, 0, spread, 0, state, k * lanes, mean, 0, lanes)
    inverse_deviation((F32(1.0 / dim), _EPSILON), spread, 0, spread, 0, lanes)
    for k in range(dim):
        normalise(
            (weight[at + k], bias[at + k]), state, k * lanes,
            state, k * lanes, mean, 0, spread, 0, lanes,
        )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _attend_to_patches(block, blocks, scratch, attention, at, keep_attention):
    """Self-attention of a cell's patches: from state to mixed.

    Scores are kept transposed, [key, query], so that the softmax runs down columns.
    """
    dim, lanes, patches = blocks.dim, blocks.lanes, blocks.patches
    head_dim = dim // blocks.heads
    projected, scores = scratch.projected, scratch.scores
    highest, total = scratch.mean, scratch.spread
    _linear(
        blocks.in_weight, block * 3 * dim * dim, blocks.in_bias, block * 3 * dim, 3 * dim, dim,
        scratch.state, projected, lanes,
    )  # fmt: skip
    fill((F32(0.0),), scratch.mixed, 0, scratch.mixed, 0, dim * lanes)
    for h in range(blocks.heads):
        queries = h * head_dim * lanes
        keys, values = queries + dim * lanes, queries + 2 * dim * lanes
        fill((F32(0.0),), scores, 0, scores, 0, patches * lanes)
        multiply_add(
            scores, 0, lanes, patches, lanes,
            projected, keys, 1, lanes,
            projected, queries, lanes,
            head_dim,
        )  # fmt: skip
        scale((F32(1.0),), highest, 0, scores, 0, lanes)
        for key in range(1, patches):
            larger((), highest, 0, highest, 0, scores, key * lanes, lanes)
        fill((F32(0.0),), total, 0, total, 0, lanes)
        factor = (F32(1.0 / math.sqrt(head_dim)),)
        for key in range(patches):
            exp_difference(factor, scores, key * lanes, scores, key * lanes, highest, 0, lanes)
            add((), total, 0, total, 0, scores, key * lanes, lanes)
        multiply_add(
            scratch.mixed, queries, lanes, head_dim, lanes,
            projected, values, lanes, 1,
            scores, 0, lanes,
            patches,
        )  # fmt: skip
        for d in range(head_dim):
            row = queries + d * lanes
            divide_where_positive((), scratch.mixed, row, scratch.mixed, row, total, 0, lanes)
        if keep_attention:
            for query in range(patches):
                for key in range(patches):
                    place = at + (h * patches + query) * patches + key
                    attention[place] = scores[key * lanes + query] / total[query]
