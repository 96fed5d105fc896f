"""The rest of the encoder, after the cross-attention, as Triton functions on one cell.

A cell is a tile x [p, D] of 64 x 32 numbers that stays in registers from the first layer norm to
the pooled embedding. Matrix products take their operands in the tables' type and add up in
float32; everything else is float32.

What a cell costs, at the paper's sizes: 1.9 million multiply-adds (cross-attention's output
projection and MLP 0.33, each of two self-attention blocks 0.79, projection 0.02), 16,384
exponentials and 12,288 error functions, and 25,000 weights, 50 KB in bf16, read from L1 or L2. It
reads nothing of a cell from device memory and writes its features only.

Weights lie in two buffers, made by `tables.prepare`: `matrices` in the tables' type, [in, out],
and `vectors` in float32. All dimensions are padded to powers of two by zeros; weights of layer
norms too, so that padding stays zero throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .product import levelled, scaled_product

EPSILON = tl.constexpr(1e-5)  # of layer norms


@triton.jit
def load_matrix(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return tl.load(matrix + row[:, None] * COLUMNS + column[None, :])


@triton.jit
def multiply(x, weight, unscale):
    """x [p, k] · weight [k, m], float32, in the weight's type; see `tables.Tables.unscale`."""
    return scaled_product(x.to(weight.dtype), weight) * unscale


@triton.jit
def affine(x, weight, bias, unscale, COLUMNS: tl.constexpr):
    """x [p, k] · weight [k, COLUMNS] + bias, float32; ``bias`` is a pointer."""
    return multiply(x, weight, unscale) + tl.load(bias + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def layer_norm(x, weight, bias, dim, DIM: tl.constexpr):
    """Layer norm of x [p, DIM] over its first ``dim`` columns."""
    column = tl.arange(0, DIM)
    mean = tl.sum(x, 1) / dim  # padding is 0
    centred = tl.where(column[None, :] < dim, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / dim
    scaled = centred * tl.rsqrt(variance + EPSILON)[:, None]
    return scaled * tl.load(weight + column)[None, :] + tl.load(bias + column)[None, :]


@triton.jit
def project_out(y, attended, matrix, unscale, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """y [p, DIM] + attended [p, d] of one head · that head's rows of the output projection."""
    return y + multiply(attended, load_matrix(matrix, HEAD_DIM, DIM), unscale)


@triton.jit
def finish_block(x, matrices, vectors, unscale, dim, DIM: tl.constexpr, MLP: tl.constexpr):
    """Layer norm, MLP, residual, layer norm of x [p, DIM], the sum of residual and attention."""
    x = layer_norm(x, vectors, vectors + DIM, dim, DIM)
    up, down = load_matrix(matrices, DIM, MLP), load_matrix(matrices + DIM * MLP, MLP, DIM)
    vectors += 2 * DIM
    inner = affine(x, up, vectors, unscale, MLP)
    inner = 0.5 * inner * (1.0 + tl.erf(inner * 0.7071067811865476))  # GELU
    vectors += MLP
    x += affine(inner, down, vectors, unscale, DIM)
    return layer_norm(x, vectors + DIM, vectors + 2 * DIM, dim, DIM)


@triton.jit
def self_attend(x, matrices, vectors, unscale, patches, PATCHES: tl.constexpr,
                HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """x [p, DIM] + attention among the patches of a cell, with its output projection."""
    dtype: tl.constexpr = matrices.dtype.element_ty
    p = tl.arange(0, PATCHES)
    y = x
    for h in tl.static_range(HEADS):
        projected = ()
        for part in tl.static_range(3):  # query, key, value
            weight = load_matrix(matrices + (part * HEADS + h) * DIM * HEAD_DIM, DIM, HEAD_DIM)
            bias = vectors + (part * HEADS + h) * HEAD_DIM
            projected = projected + (affine(x, weight, bias, unscale, HEAD_DIM).to(dtype),)
        keys, key_scale = levelled(projected[1])
        rows, row_scale = levelled(projected[2])
        scores = scaled_product(projected[0], tl.trans(keys)) * key_scale  # [p, p]
        scores = tl.where(p[None, :] < patches, scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        attended = scaled_product(weights.to(dtype), rows)
        attended *= (row_scale / tl.sum(weights, 1))[:, None]
        place = matrices + (3 * HEADS * DIM + h * DIM) * HEAD_DIM
        y = project_out(y, attended, place, unscale, HEAD_DIM, DIM)
    return y


@triton.jit
def run_blocks(y, matrices, vectors, unscale, patches, dim, DEPTH: tl.constexpr,
               PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
               DIM: tl.constexpr, MLP: tl.constexpr):  # fmt: skip
    """All that follows the cross-attention's output projection: features before `project`.

    ``y`` [p, DIM] is residual plus attention, without the projection's bias. Also returns where
    the weights of the final projection lie.
    """
    attention_matrices: tl.constexpr = 4 * HEADS * HEAD_DIM * DIM
    attention_vectors: tl.constexpr = 3 * HEADS * HEAD_DIM
    for block in tl.static_range(DEPTH):
        if block > 0:
            y = self_attend(y, matrices, vectors, unscale, patches, PATCHES, HEADS, HEAD_DIM, DIM)
        matrices += attention_matrices
        vectors += attention_vectors
        y += tl.load(vectors + tl.arange(0, DIM))[None, :]  # bias of the output projection
        y = finish_block(y, matrices, vectors + DIM, unscale, dim, DIM, MLP)
        matrices += 2 * DIM * MLP
        vectors += 6 * DIM + MLP
    return y, matrices, vectors


@triton.jit
def project(x, matrix, bias, unscale, DIM: tl.constexpr, OUTPUT: tl.constexpr):
    """The final projection of x [p, DIM] to [p, OUTPUT]."""
    return affine(x, load_matrix(matrix, DIM, OUTPUT), bias, unscale, OUTPUT)
