"""Ragged attention on the GPU, backward: all gradients from one pass over the entries.

A program of `differentiate_slots` owns one chunk of a cell and one head, as in the forward, and all
queries. Per tile of entries and block of at most 64 queries it computes the weights again, from
scores and the log-sum-exp, and five products in all; nothing of size entries x queries is kept.

Tiles are [n, q], entries by queries, so that weights and gradients of scores are operands of the
products for values and keys in place; only the product for the queries needs them turned.

Where a gradient goes:

- Of keys and values: a tile's are in registers until all blocks of queries have added to them, so
  they are written once: to their own row of an entry, or added to the row of a table that an id
  points to (ATOMIC), in float32.
- Of queries: float32 partial sums per slot, [slots, queries, heads, head_dim]. One block of queries
  stays in registers over the chunk (ONE_BLOCK); of more, each is read and added to per tile, by
  this program alone. Blocks outside, tiles inside would read and add to the gradients of keys and
  values instead: twice the bytes, and as many atomics per entry as there are blocks.
- Of the parts: the product of a matrix of amounts, or of which entry is in which bin, [parts, n],
  with a tile's gradients [n, d], summed over the chunk: [slots, 2, parts, heads, head_dim].
- Of the bias: sums over the queries.

What an entry costs at CellPatch's size (64 queries, 2 heads of 16, bf16, tables and amounts; both
heads together):

- Bytes: 3 of its id and amount from device memory; 128 of its rows of keys and values from L2; 256
  of float32 atomics to L2. Per cell, 12 KB of queries and gradients, and 8 KB of partial sums per
  chunk. In the sorted way, instead of atomics: 256 written to device memory, read once, and 16 of
  the sorted rows, besides the sort.
- Matrix units: 10,240 multiply-adds in five products, 1,024 for the parts.
- 128 exponentials: 8 clocks of a multiprocessor.

In clocks per entry, counted in the machine code of the loop (``bench/ragged_resources.py``), the
instructions take 23 on architecture 80, 19 on 90 and 21 on 100, the matrix units 11 on 80: issuing
them bounds the kernel. With dropped weights and a bias they take 49, 42 and 39: a weight costs a
quarter of the seven rounds of a Philox call. None of this was timed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import cell_bounds, chunk_of_slot
from .ragged import (
    LOG2_E,
    UNSPECIALIZED,
    chunk_of,
    kept_weights,
    load_bias,
    load_entries,
    load_queries,
    load_tile,
    product,
    query_places,
    weigh,
)


@triton.jit
def load_block(query, gradient, log_sum_exp, delta, cell, begin, head, queries, heads, query_step,
               HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
               EXACT: tl.constexpr):  # fmt: skip
    """Of one block of queries: queries and output's gradient [q, d], log-sum-exp and delta [q].

    The log-sum-exp is +inf where a query attends to nothing, or there is none: weights are then 0.
    """
    block = load_queries(
        query, cell * query_step, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES
    )
    of_output = load_queries(gradient, cell, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES)
    q = begin + tl.arange(0, QUERIES)
    place = (cell * heads + head) * queries + q
    logarithm = tl.load(log_sum_exp + place, mask=q < queries, other=float("inf"))
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    logarithm = logarithm if EXACT else logarithm * LOG2_E
    return block, of_output, logarithm, tl.load(delta + place, mask=q < queries, other=0.0)


@triton.jit
def differentiate(keys, values, block, sums, extra, inside, seed, local, cell, head, begin, queries,
                  limit, factor, keep_scale, EXACT: tl.constexpr,
                  BIASED: tl.constexpr):  # fmt: skip
    """What a block of queries adds to the gradients of one tile of entries, but for the ``scale``.

    Parameters
    ----------
    keys, values
        [n, d].
    block
        As of `load_block`.
    sums
        Gradients so far: of keys and values, [n, d] each, of the bias, [n], and of the queries,
        [q, d].
    extra
        Added to the scores [n], with BIASED; without, entries that are not ``inside`` [n] count 0.
    seed, local, cell, head, begin, queries, limit
        As of `kept_weights`.

    Returns
    -------
    The new ``sums``.
    """
    query, of_output, logarithm, delta = block
    of_keys, of_values, of_bias, of_queries = sums
    TILE: tl.constexpr = keys.shape[0]
    QUERIES: tl.constexpr = query.shape[0]
    scores = tl.dot(keys, tl.trans(query), input_precision="tf32x3")  # [n, q]
    if BIASED:
        scores = scores * factor + extra[:, None] - logarithm[None, :]
    else:
        scores = tl.where(inside[:, None], scores * factor - logarithm[None, :], float("-inf"))
    weights = weigh(scores, EXACT)
    of_weights = tl.dot(values, tl.trans(of_output), input_precision="tf32x3")  # [n, q]
    used = weights
    if seed is not None:
        kept = kept_weights(seed, local, cell, head, begin, queries, limit, TILE, QUERIES)
        used = tl.where(kept, weights * keep_scale, 0.0)
        of_weights = tl.where(kept, of_weights * keep_scale, 0.0)
    of_values = product(used.to(values.dtype), of_output, of_values)
    of_scores = weights * (of_weights - delta[None, :])
    if BIASED:
        of_bias += tl.sum(of_scores, 1)
    of_scores = of_scores.to(keys.dtype)
    of_keys = product(of_scores, query, of_keys)
    of_queries = product(tl.trans(of_scores), keys, of_queries)
    return of_keys, of_values, of_bias, of_queries


@triton.jit
def part_matrix(amount, dtype: tl.constexpr, BINNED: tl.constexpr, PARTS: tl.constexpr):
    """What multiplied with gradients of entries [n, d] gives those of the parts [PARTS, d].

    Of bins: 1 where the amount is that bin. Else two rows whose sum is the amount, which ``dtype``
    may hold no more exactly than that.
    """
    part = tl.arange(0, PARTS)[:, None]
    if BINNED:
        return (amount.to(tl.int32)[None, :] == part).to(dtype)
    else:
        rounded = amount.to(dtype).to(tl.float32)
        return tl.where(
            part == 0, rounded[None, :], tl.where(part == 1, (amount - rounded)[None, :], 0.0)
        ).to(dtype)


@UNSPECIALIZED
def differentiate_slots(query, key, value, offsets, ids, amounts, key_part, value_part, bias, seed,
                        gradient, delta, log_sum_exp,
                        of_query, of_key, of_value, of_parts, of_bias, faults,
                        cells, entries, rows, bins, queries, heads, query_step, limit, scale,
                        keep_scale, first_head, some_heads,
                        HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BINNED: tl.constexpr,
                        WIDE: tl.constexpr, QUERIES: tl.constexpr, ONE_BLOCK: tl.constexpr,
                        ATOMIC: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
                        STAGES: tl.constexpr):  # fmt: skip
    """One chunk and one head of ``some_heads`` from ``first_head``.

    ``of_key`` and ``of_value`` are [entries, some_heads, HEAD_DIM], or with ATOMIC
    [rows + 1, some_heads, HEAD_DIM] of float32 zeros; ``of_query`` holds zeros unless ONE_BLOCK.
    """
    EXACT: tl.constexpr = key.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    head = first_head + program % some_heads
    slot = program // some_heads
    cell, first, count = chunk_of_slot(slot, offsets, cells, entries, faults)
    of_cell, _count = cell_bounds(offsets, cell, entries, faults)
    done = (first - of_cell).to(tl.int32)
    factor = scale if EXACT else scale * LOG2_E
    slot = slot.to(tl.int64)
    d = tl.arange(0, DIM)
    keys_of, values_of, ids, amounts, biases = chunk_of(
        key, value, ids, amounts, bias, first, heads * HEAD_DIM, heads
    )
    if not ATOMIC:
        of_key += first * (some_heads * HEAD_DIM)
        of_value += first * (some_heads * HEAD_DIM)
    if bias is not None:
        of_bias += first * heads
    of_block = tl.zeros([QUERIES, DIM], tl.float32)
    of_key_part = tl.zeros([PARTS, DIM], tl.float32)
    of_value_part = tl.zeros([PARTS, DIM], tl.float32)
    # What does not change in a loop is kept in registers, as operands, whether they fit or not: the
    # queries of narrow heads do. Others are loaded for each tile, and the compiler cannot know that
    # it is the same block again where there is but one.
    RESIDENT: tl.constexpr = ONE_BLOCK and DIM == 16 and not EXACT
    blocks = tl.cdiv(queries, QUERIES)
    if RESIDENT:
        block = load_block(
            query, gradient, log_sum_exp, delta, cell, 0, head, queries, heads, query_step,
            HEAD_DIM, DIM, QUERIES, EXACT,
        )  # fmt: skip
    of_keys, of_values = tl.zeros([TILE, DIM], tl.float32), tl.zeros([TILE, DIM], tl.float32)
    of_biases = tl.zeros([TILE], tl.float32)
    for step in tl.range(0, tl.cdiv(count, TILE) * blocks, num_stages=STAGES):
        start, begin = step // blocks * TILE, step % blocks * QUERIES
        entry = start + tl.arange(0, TILE)
        inside = entry < count
        row, amount, _unknown = load_entries(ids, amounts, start, count, rows, bins, TILE, WIDE)
        keys = load_tile(keys_of, key_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED)
        values = load_tile(values_of, value_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED)
        extra = 0.0
        if bias is not None:
            extra = load_bias(biases, start, count, head, heads, EXACT, TILE)
        if not RESIDENT:
            block = load_block(
                query, gradient, log_sum_exp, delta, cell, begin, head, queries, heads, query_step,
                HEAD_DIM, DIM, QUERIES, EXACT,
            )  # fmt: skip
        if ONE_BLOCK:
            of_keys, of_values = tl.zeros_like(of_keys), tl.zeros_like(of_values)
            of_biases = tl.zeros_like(of_biases)
        else:
            of_block = tl.zeros_like(of_block)
        of_keys, of_values, of_biases, of_block = differentiate(
            keys, values, block, (of_keys, of_values, of_biases, of_block), extra, inside, seed,
            done + start, cell, head, begin, queries, limit, factor, keep_scale, EXACT,
            bias is not None,
        )  # fmt: skip
        if not ONE_BLOCK:
            place, kept = query_places(slot, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES)
            before = tl.load(of_query + place, mask=kept, other=0.0)
            tl.store(of_query + place, before + scale * of_block, mask=kept)
        if ONE_BLOCK or begin + QUERIES >= queries:
            of_keys *= scale
            real = d[None, :] < HEAD_DIM
            if ATOMIC:  # a row beyond the last takes what belongs to none
                to = tl.where(row < 0, rows, row)[:, None] * (some_heads * HEAD_DIM)
                to += (head - first_head) * HEAD_DIM + d[None, :]
                tl.atomic_add(of_key + to, of_keys, mask=real, sem="relaxed")
                tl.atomic_add(of_value + to, of_values, mask=real, sem="relaxed")
            else:
                to = entry[:, None] * (some_heads * HEAD_DIM)
                to += (head - first_head) * HEAD_DIM + d[None, :]
                exists = inside[:, None] & real
                tl.store(of_key + to, of_keys.to(of_key.dtype.element_ty), mask=exists)
                tl.store(of_value + to, of_values.to(of_value.dtype.element_ty), mask=exists)
            if of_parts is not None:
                parts = part_matrix(amount, keys.dtype, BINNED, PARTS)
                of_key_part = product(parts, of_keys.to(keys.dtype), of_key_part)
                of_value_part = product(parts, of_values.to(keys.dtype), of_value_part)
            if bias is not None:
                tl.store(of_bias + entry * heads + head, of_biases, mask=inside)
            if not ONE_BLOCK:
                of_keys, of_values = tl.zeros_like(of_keys), tl.zeros_like(of_values)
                of_biases = tl.zeros_like(of_biases)
                tl.debug_barrier()  # the next tile adds to what other threads may have written
    if ONE_BLOCK:
        place, kept = query_places(slot, 0, head, queries, heads, HEAD_DIM, DIM, QUERIES)
        tl.store(of_query + place, scale * of_block, mask=kept)
    if of_parts is not None:
        part = tl.arange(0, PARTS)[:, None]
        place = ((slot * 2 * PARTS + part) * heads + head) * HEAD_DIM + d[None, :]
        kept = (part >= 0) & (d[None, :] < HEAD_DIM)
        tl.store(of_parts + place, of_key_part, mask=kept)
        tl.store(of_parts + place + PARTS * heads * HEAD_DIM, of_value_part, mask=kept)
