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

from .product import scaled_product, scaled_terms

EPSILON = tl.constexpr(1e-5)  # of layer norms


@triton.jit
def load_matrix(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr):
    """[ROWS, COLUMNS], in terms, which lie one after the other."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    terms = ()
    for term in tl.static_range(TERMS):
        terms = terms + (tl.load(matrix + (term * ROWS + row) * COLUMNS + column),)
    return terms


@triton.jit
def multiply(x, matrix, unscale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr):
    """x [p, ROWS] · matrix [ROWS, COLUMNS], float32; see `tables.Tables.unscale`."""
    weight = load_matrix(matrix, ROWS, COLUMNS, TERMS)
    return scaled_product(x, weight, matrix.dtype.element_ty, TERMS) * unscale


@triton.jit
def affine(x, matrix, bias, unscale, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           TERMS: tl.constexpr):  # fmt: skip
    """`multiply`, plus a bias."""
    added = tl.load(bias + tl.arange(0, COLUMNS))[None, :]
    return multiply(x, matrix, unscale, ROWS, COLUMNS, TERMS) + added


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
def finish_block(x, matrices, vectors, unscale, dim, DIM: tl.constexpr, MLP: tl.constexpr,
                 TERMS: tl.constexpr):  # fmt: skip
    """Layer norm, MLP, residual, layer norm of x [p, DIM], the sum of residual and attention."""
    x = layer_norm(x, vectors, vectors + DIM, dim, DIM)
    vectors += 2 * DIM
    inner = affine(x, matrices, vectors, unscale, DIM, MLP, TERMS)
    inner = 0.5 * inner * (1.0 + tl.erf(inner * 0.7071067811865476))  # GELU
    vectors += MLP
    x += affine(inner, matrices + TERMS * DIM * MLP, vectors, unscale, MLP, DIM, TERMS)
    return layer_norm(x, vectors + DIM, vectors + 2 * DIM, dim, DIM)


@triton.jit
def self_attend(x, matrices, vectors, unscale, patches, PATCHES: tl.constexpr,
                HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
                TERMS: tl.constexpr):  # fmt: skip
    """x [p, DIM] + attention among the patches of a cell, with its output projection."""
    dtype: tl.constexpr = matrices.dtype.element_ty
    size: tl.constexpr = TERMS * DIM * HEAD_DIM  # of one head's matrix
    p = tl.arange(0, PATCHES)
    y = x
    for h in tl.range(0, HEADS, num_stages=1):
        projected = ()
        for part in tl.static_range(3):  # query, key, value
            matrix = matrices + (part * HEADS + h) * size
            bias = vectors + (part * HEADS + h) * HEAD_DIM
            projected = projected + (affine(x, matrix, bias, unscale, DIM, HEAD_DIM, TERMS),)
        keys, key_scale = scaled_terms(tl.trans(projected[1]), dtype, TERMS)
        rows, row_scale = scaled_terms(projected[2], dtype, TERMS)
        scores = scaled_product(projected[0], keys, dtype, TERMS) * key_scale  # [p, p]
        scores = tl.where(p[None, :] < patches, scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        attended = scaled_product(weights, rows, dtype, TERMS)
        attended *= (row_scale / tl.sum(weights, 1))[:, None]
        matrix = matrices + (3 * HEADS + h) * size
        y += multiply(attended, matrix, unscale, HEAD_DIM, DIM, TERMS)
    return y


@triton.jit
def run_blocks(y, matrices, vectors, unscale, patches, dim, DEPTH: tl.constexpr,
               PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
               DIM: tl.constexpr, MLP: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """All that follows the cross-attention's output projection: features before `project`.

    ``y`` [p, DIM] is residual plus attention, without the projection's bias. Also returns where
    the weights of the final projection lie.
    """
    attention_matrices: tl.constexpr = TERMS * 4 * HEADS * HEAD_DIM * DIM
    attention_vectors: tl.constexpr = 3 * HEADS * HEAD_DIM
    for block in tl.range(0, DEPTH, num_stages=1):  # a loop, as unrolled it compiles for a minute
        if block > 0:
            y = self_attend(
                y, matrices, vectors, unscale, patches, PATCHES, HEADS, HEAD_DIM, DIM, TERMS
            )
        matrices += attention_matrices
        vectors += attention_vectors
        y += tl.load(vectors + tl.arange(0, DIM))[None, :]  # bias of the output projection
        y = finish_block(y, matrices, vectors + DIM, unscale, dim, DIM, MLP, TERMS)
        matrices += TERMS * 2 * DIM * MLP
        vectors += 6 * DIM + MLP
    return y, matrices, vectors
