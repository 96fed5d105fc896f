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
- Of the parts: amount times gradient, summed over the chunk: [slots, 2, heads, head_dim].
- Of the bias: sums over the queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import cell_bounds, chunk_of_slot
from .ragged import (
    LOG2_E,
    UNSPECIALIZED,
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
def differentiate(keys, values, block, sums, extra, inside, seed, local, cell, column, limit,
                  factor, keep_scale, EXACT: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
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
    seed, local, cell, column, limit
        As of `kept_weights`, where ``column`` is that of the first query.

    Returns
    -------
    The new ``sums``.
    """
    queries, of_output, logarithm, delta = block
    of_keys, of_values, of_bias, of_queries = sums
    TILE: tl.constexpr = keys.shape[0]
    QUERIES: tl.constexpr = queries.shape[0]
    scores = tl.dot(keys, tl.trans(queries), input_precision="tf32x3")  # [n, q]
    if BIASED:
        scores = scores * factor + extra[:, None] - logarithm[None, :]
    else:
        scores = tl.where(inside[:, None], scores * factor - logarithm[None, :], float("-inf"))
    weights = weigh(scores, EXACT)
    of_weights = tl.dot(values, tl.trans(of_output), input_precision="tf32x3")  # [n, q]
    used = weights
    if seed is not None:
        columns = column + tl.arange(0, QUERIES)
        kept = tl.trans(kept_weights(seed, local, cell, columns, limit, TILE, QUERIES))
        used = tl.where(kept, weights * keep_scale, 0.0)
        of_weights = tl.where(kept, of_weights * keep_scale, 0.0)
    of_values = product(used.to(values.dtype), of_output, of_values)
    of_scores = weights * (of_weights - delta[None, :])
    if BIASED:
        of_bias += tl.sum(of_scores, 1)
    of_scores = of_scores.to(keys.dtype)
    of_keys = product(of_scores, queries, of_keys)
    of_queries = product(tl.trans(of_scores), keys, of_queries)
    return of_keys, of_values, of_bias, of_queries


@triton.jit
def sum_to(ROWS: tl.constexpr, tile):
    """A tile [n, d] as it is, or its sum over the entries [1, d]."""
    if tile.shape[0] == ROWS:
        return tile
    else:
        return tl.sum(tile, 0, keep_dims=True)


@UNSPECIALIZED
def differentiate_slots(query, key, value, offsets, ids, amounts, key_part, value_part, bias, seed,
                        gradient, delta, log_sum_exp,
                        of_query, of_key, of_value, of_parts, of_bias, faults,
                        cells, entries, rows, bins, queries, heads, query_step, limit, scale,
                        keep_scale, first_head, some_heads,
                        HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BINNED: tl.constexpr,
                        QUERIES: tl.constexpr, ONE_BLOCK: tl.constexpr, ATOMIC: tl.constexpr,
                        TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One chunk and one head of ``some_heads`` from ``first_head``.

    ``of_key`` and ``of_value`` are [entries, some_heads, HEAD_DIM], or with ATOMIC
    [rows, some_heads, HEAD_DIM] of float32 zeros; ``of_query`` holds zeros unless ONE_BLOCK.
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
    of_block = tl.zeros([QUERIES, DIM], tl.float32)
    # narrow ones are summed over a tile's entries at the end, for which there are registers
    PART_ROWS: tl.constexpr = TILE if DIM <= 32 else 1
    of_key_part = tl.zeros([PART_ROWS, DIM], tl.float32)
    of_value_part = tl.zeros([PART_ROWS, DIM], tl.float32)
    if ONE_BLOCK:
        block = load_block(
            query, gradient, log_sum_exp, delta, cell, 0, head, queries, heads, query_step,
            HEAD_DIM, DIM, QUERIES, EXACT,
        )  # fmt: skip
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        entry = start + tl.arange(0, TILE)
        inside = entry < count
        row, amount, _unknown = load_entries(ids, amounts, first, start, count, rows, bins, TILE)
        keys = load_tile(key, key_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED)
        values = load_tile(value, value_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED)
        extra = 0.0
        if bias is not None:
            extra = load_bias(bias, first, start, count, head, heads, EXACT, TILE)
        of_keys, of_values = tl.zeros([TILE, DIM], tl.float32), tl.zeros([TILE, DIM], tl.float32)
        of_biases = tl.zeros([TILE], tl.float32)
        if ONE_BLOCK:
            of_keys, of_values, of_biases, of_block = differentiate(
                keys, values, block, (of_keys, of_values, of_biases, of_block), extra, inside,
                seed, done + start, cell, head * queries, limit, factor, keep_scale, EXACT,
                bias is not None,
            )  # fmt: skip
        else:
            for begin in range(0, queries, QUERIES):
                block = load_block(
                    query, gradient, log_sum_exp, delta, cell, begin, head, queries, heads,
                    query_step, HEAD_DIM, DIM, QUERIES, EXACT,
                )  # fmt: skip
                of_keys, of_values, of_biases, of_block = differentiate(
                    keys, values, block,
                    (of_keys, of_values, of_biases, tl.zeros([QUERIES, DIM], tl.float32)),
                    extra, inside, seed, done + start, cell, head * queries + begin, limit, factor,
                    keep_scale, EXACT, bias is not None,
                )  # fmt: skip
                place, kept = query_places(
                    slot, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES
                )
                before = tl.load(of_query + place, mask=kept, other=0.0)
                tl.store(of_query + place, before + scale * of_block, mask=kept)
            tl.debug_barrier()  # the next tile adds to what other threads may have written
        of_keys *= scale
        if ATOMIC:
            place = row[:, None] * (some_heads * HEAD_DIM)
        else:
            place = (first + entry)[:, None] * (some_heads * HEAD_DIM)
        place += (head - first_head) * HEAD_DIM + d[None, :]
        real = d[None, :] < HEAD_DIM
        if ATOMIC:
            kept = (row >= 0)[:, None] & real
            tl.atomic_add(of_key + place, of_keys, mask=kept, sem="relaxed")
            tl.atomic_add(of_value + place, of_values, mask=kept, sem="relaxed")
        else:
            kept = inside[:, None] & real
            tl.store(of_key + place, of_keys.to(of_key.dtype.element_ty), mask=kept)
            tl.store(of_value + place, of_values.to(of_value.dtype.element_ty), mask=kept)
        if of_parts is not None:
            of_key_part += sum_to(PART_ROWS, amount[:, None] * of_keys)
            of_value_part += sum_to(PART_ROWS, amount[:, None] * of_values)
        if bias is not None:
            tl.store(of_bias + (first + entry) * heads + head, of_biases, mask=inside)
    if ONE_BLOCK:
        place, kept = query_places(slot, 0, head, queries, heads, HEAD_DIM, DIM, QUERIES)
        tl.store(of_query + place, scale * of_block, mask=kept)
    if of_parts is not None:
        place = of_parts + (slot * 2 * heads + head) * HEAD_DIM + d
        tl.store(place, tl.sum(of_key_part, 0), mask=d < HEAD_DIM)
        tl.store(place + heads * HEAD_DIM, tl.sum(of_value_part, 0), mask=d < HEAD_DIM)
