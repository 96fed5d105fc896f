"""Ragged attention on the GPU, forward: tiles that both directions share, and the kernels.

A program of `attend_slots` is one block of at most 64 queries of one head, over one chunk of at
most CHUNK entries of one cell. Chunks are found by the slots of `cells.py`: no table of them, no
waiting. It passes over the entries in tiles, with a running maximum. A cell of one chunk is done
then; chunks of longer cells leave their sums in float32, which `merge_slots` adds up in a fixed
order. So a cell's bits depend on that cell alone.

Programs of the same chunk lie side by side in the grid, (slot, head, block) with the block running
fastest: what they read of keys and values comes from device memory once, then from L2.

Keys and values of a tile are composed before use: the row that an id points to, plus what the
entry's amount has of the part, once per entry and not per query. Composing costs 2 * head_dim
multiply-adds per entry and head, splitting the score and its gradients into row and part 4 per
entry, head and query: 32 against 256 at CellPatch's size.

What an entry costs at CellPatch's size (64 queries, 2 heads of 16, bf16; both heads together): 3
bytes of its id and amount from device memory, 128 of its rows from L2; 4,096 multiply-adds on the
matrix units and 128 exponentials, which take 4 and 8 clocks of a multiprocessor of architecture 80;
to issue all instructions of the loop takes 16 there, 15 on 90 and 18 on 100, counted in the machine
code (``bench/kernel_resources.py``; not timed). The kernel of the fused encoder needs 5: it knows
the range of scores beforehand, which any other caller's keys do not allow.

float32 is computed as three products in tf32, which keep its precision, and in units of e rather
than of 2: a score of 100 in units of 2 has rounding errors of 1e-5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import CHUNK
from .cells import cell_bounds, chunk_of_slot, report_unknown

LOG2_E = tl.constexpr(1.4426950408889634)
# One compilation for all batches: not another for counts that are 1 or divisible by 16, nor for
# inputs that begin within 16 bytes (entries of a cell do anyway).
UNSPECIALIZED = triton.jit(
    do_not_specialize=[
        "cells", "entries", "rows", "bins", "queries", "heads", "first_head", "all_heads",
        "query_step", "limit",
    ],
    do_not_specialize_on_alignment=["offsets", "ids", "amounts", "bias", "seed"],
)  # fmt: skip
# A cell of more than CHUNK entries has at most 2 * entries / CHUNK chunks: those of such cells
# keep their sums in places that are numbered by this many entries.
ENTRIES_PER_PLACE = tl.constexpr(CHUNK.value // 2)


@triton.jit
def product(a, b, sums):
    """a [m, k] · b [k, n] + sums, float32.

    The matrix units round their accumulator towards zero, which would cost float32 its precision
    in a long sum: there, the product is summed from zero and added on the ordinary way.
    """
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
    else:
        return tl.dot(a, b, sums)


@triton.jit
def load_entries(ids, amounts, start, count, rows, bins, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Row [n] and amount float32 [n] of the entries of one tile.

    ``ids`` and ``amounts`` point to those of the chunk; without ids, an entry's row is its number
    in the chunk. The row is -1 beyond the end, or where an id has no row; the amount is 0 beyond
    the end, and -1 where it has no bin. Such rows and bins are not read: they count as zeros.
    ``bins`` is 0 for an affine part. Rows are int64 where WIDE, else int32.

    Also returns int32 [n]: 1 where an id has no row, 2 where an amount has no bin.
    """
    entry = start + tl.arange(0, TILE)
    inside = entry < count
    unknown = tl.zeros([TILE], tl.int32)
    row = entry
    if ids is not None:
        found = tl.load(ids + entry, mask=inside, other=0)
        known = (found >= 0) & (found < rows)
        unknown = (inside & ~known).to(tl.int32)
        row = tl.where(known, found.to(tl.int64 if WIDE else tl.int32), -1)
    row = tl.where(inside, row, -1)
    amount = tl.zeros([TILE], tl.float32)
    if amounts is not None:
        amount = tl.load(amounts + entry, mask=inside, other=0).to(tl.float32)
        no_bin = (bins > 0) & (amount >= bins)
        unknown += 2 * no_bin.to(tl.int32)
        amount = tl.where(no_bin, -1.0, amount)
    return row, amount, unknown


@triton.jit
def load_tile(table, part, row, amount, head, heads, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
              BINNED: tl.constexpr):  # fmt: skip
    """Keys or values [n, d] of a tile of entries: row of the table and part of the amount."""
    d = tl.arange(0, DIM)[None, :]
    real = d < HEAD_DIM
    kept = (row >= 0)[:, None] & real
    stride = heads * HEAD_DIM
    place = row[:, None] * stride + head * HEAD_DIM + d
    tile = tl.load(table + place, mask=kept, other=0.0)
    if part is not None:
        if BINNED:
            place = amount.to(tl.int32)[:, None] * stride + head * HEAD_DIM + d
            kept = kept & (amount >= 0)[:, None]
            of_amount = tl.load(part + place, mask=kept, other=0.0).to(tl.float32)
        else:
            slope = tl.load(part + head * HEAD_DIM + d, mask=real, other=0.0).to(tl.float32)
            of_amount = amount[:, None] * slope
        tile = (tile.to(tl.float32) + of_amount).to(tile.dtype)
    return tile


@triton.jit
def load_bias(bias, start, count, head, heads, EXACT: tl.constexpr, TILE: tl.constexpr):
    """What is added to the scores of a tile's entries [n]; -inf beyond the end.

    ``bias`` points to that of the chunk.
    """
    entry = start + tl.arange(0, TILE)
    found = tl.load(bias + entry * heads + head, mask=entry < count, other=float("-inf"))
    return found if EXACT else found * LOG2_E


@triton.jit
def chunk_of(key, value, ids, amounts, bias, first, stride, heads):
    """Pointers to what a chunk has, whose first entry is ``first``: within it, places fit 32 bits.

    Tables stay as they are. ``stride`` is between rows of keys and values.
    """
    if ids is None:
        key += first * stride
        value += first * stride
    else:
        ids += first
    if amounts is not None:
        amounts += first
    if bias is not None:
        bias += first * heads
    return key, value, ids, amounts, bias


@triton.jit
def load_queries(tensor, cell, begin, head, queries, heads, HEAD_DIM: tl.constexpr,
                 DIM: tl.constexpr, QUERIES: tl.constexpr):  # fmt: skip
    """The block [q, d] that begins at query ``begin`` of a tensor [c, queries, heads, d]."""
    place, kept = query_places(cell, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES)
    return tl.load(tensor + place, mask=kept, other=0.0)


@triton.jit
def query_places(cell, begin, head, queries, heads, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
                 QUERIES: tl.constexpr):  # fmt: skip
    """Where that block is, int64 [q, d], and which of it exists."""
    q = begin + tl.arange(0, QUERIES)[:, None]
    d = tl.arange(0, DIM)[None, :]
    place = ((cell * queries + q) * heads + head) * HEAD_DIM + d
    return place, (q < queries) & (d < HEAD_DIM)


@triton.jit
def weigh(scores, EXACT: tl.constexpr):
    """Exponentials of scores in units of e (EXACT), or of 2."""
    return tl.exp(scores) if EXACT else tl.exp2(scores)


@triton.jit
def kept_weights(seed, first_local, cell, head, begin, queries, limit, TILE: tl.constexpr,
                 QUERIES: tl.constexpr):  # fmt: skip
    """Which weights are not dropped: bool [n, q]; see `reference.kept`.

    Parameters
    ----------
    first_local
        Number of the tile's first entry within its cell.
    head, begin, queries
        The head, and the block's first query of how many, divisible by 4.
    limit
        A weight is kept where its word is larger; the bits of an unsigned number.
    """
    column = head * tl.cdiv(queries, 4) + begin // 4 + tl.arange(0, QUERIES // 4)
    zero = tl.zeros([TILE, QUERIES // 4], tl.int32)
    columns = zero + column[None, :]
    entries = zero + (first_local + tl.arange(0, TILE))[:, None]
    cells = zero + cell.to(tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), entries, cells, columns, zero, n_rounds=7)
    least = limit.to(tl.uint32, bitcast=True)
    pairs = tl.join(a > least, c > least), tl.join(b > least, d > least)
    return tl.reshape(tl.join(pairs[0], pairs[1]), [TILE, QUERIES])


@triton.jit
def store_output(shift, total, sums, output, log_sum_exp, cell, begin, head, queries, heads,
                 keep_scale, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
                 EXACT: tl.constexpr):  # fmt: skip
    """A block's result from sums relative to ``shift``: 0 and -inf where there is no weight."""
    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    place, kept = query_places(cell, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES)
    attended = sums * (keep_scale / divisor)[:, None]
    tl.store(output + place, attended.to(output.dtype.element_ty), mask=kept)
    logarithm = shift + tl.log(divisor) if EXACT else (shift + tl.log2(divisor)) * (1 / LOG2_E)
    q = begin + tl.arange(0, QUERIES)
    place = log_sum_exp + (cell * heads + head) * queries + q
    tl.store(place, tl.where(nothing, float("-inf"), logarithm), mask=q < queries)


@triton.jit
def partial_places(place, begin, head, queries, heads, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
                   QUERIES: tl.constexpr):  # fmt: skip
    """Where a chunk of a long cell keeps shifts [q], totals [q] and sums [q, d] of a block."""
    q = begin + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)[None, :]
    row = (place * heads + head) * queries + q
    kept = (q < queries)[:, None] & (d < HEAD_DIM)
    return row * 2, row[:, None] * HEAD_DIM + d, q < queries, kept


@UNSPECIALIZED
def attend_slots(query, key, value, offsets, ids, amounts, key_part, value_part, bias, seed,
                 output, log_sum_exp, normalizers, partials, faults,
                 cells, entries, rows, bins, queries, heads, query_step, limit, scale, keep_scale,
                 HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BINNED: tl.constexpr,
                 WIDE: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """One block of queries of one head over one chunk.

    ``query_step`` is 0 for queries that all cells share, else 1; ``limit`` and ``keep_scale``
    (1 / (1 - dropout)) matter with a ``seed``; WIDE is for tables of 2^31 numbers. What is None is
    compiled without.
    """
    blocks = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    begin = program % blocks * QUERIES
    head = program // blocks % heads
    slot = program // blocks // heads
    cell, first, count = chunk_of_slot(slot, offsets, cells, entries, faults)
    if count > 0:
        EXACT: tl.constexpr = key.dtype.element_ty == tl.float32
        of_cell, cell_count = cell_bounds(offsets, cell, entries, faults)
        done = (first - of_cell).to(tl.int32)
        factor = scale if EXACT else scale * LOG2_E
        block = load_queries(
            query, cell * query_step, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES
        )
        keys_of, values_of, ids, amounts, bias = chunk_of(
            key, value, ids, amounts, bias, first, heads * HEAD_DIM, heads
        )
        shift = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sums = tl.zeros([QUERIES, DIM], tl.float32)
        unknown = tl.zeros([TILE], tl.int32)
        for start in tl.range(0, count, TILE, num_stages=STAGES):
            row, amount, wrong = load_entries(ids, amounts, start, count, rows, bins, TILE, WIDE)
            unknown = unknown | wrong
            keys = load_tile(keys_of, key_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED)
            values = load_tile(
                values_of, value_part, row, amount, head, heads, HEAD_DIM, DIM, BINNED
            )
            scores = tl.dot(block, tl.trans(keys), input_precision="tf32x3") * factor  # [q, n]
            if bias is None:
                inside = start + tl.arange(0, TILE) < count
                scores = tl.where(inside[None, :], scores, float("-inf"))
            else:
                scores += load_bias(bias, start, count, head, heads, EXACT, TILE)[None, :]
            highest = tl.maximum(shift, tl.max(scores, 1))
            # -inf where all scores were: any finite number does
            relative_to = tl.where(highest == float("-inf"), 0.0, highest)
            weights = weigh(scores - relative_to[:, None], EXACT)
            rescale = weigh(shift - relative_to, EXACT)
            total = tl.fma(total, rescale, tl.sum(weights, 1))
            if seed is not None:
                kept = kept_weights(
                    seed, done + start, cell, head, begin, queries, limit, TILE, QUERIES
                )
                weights = tl.where(tl.trans(kept), weights, 0.0)
            sums = product(weights.to(values.dtype), values, sums * rescale[:, None])
            shift = highest
        report_unknown(tl.max(unknown, 0), faults)
        if cell_count <= CHUNK:
            store_output(
                shift, total, sums, output, log_sum_exp, cell, begin, head, queries, heads,
                keep_scale, HEAD_DIM, DIM, QUERIES, EXACT,
            )  # fmt: skip
        else:
            place = of_cell // ENTRIES_PER_PLACE + done // CHUNK
            to_range, to_sums, kept, all_kept = partial_places(
                place, begin, head, queries, heads, HEAD_DIM, DIM, QUERIES
            )
            tl.store(normalizers + to_range, shift, mask=kept)
            tl.store(normalizers + to_range + 1, total, mask=kept)
            tl.store(partials + to_sums, sums, mask=all_kept)


@UNSPECIALIZED
def merge_slots(offsets, output, log_sum_exp, normalizers, partials, faults,
                cells, entries, queries, heads, keep_scale,
                HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
                EXACT: tl.constexpr):  # fmt: skip
    """One block of queries of one head of a cell: of several chunks, or of none."""
    blocks = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    begin = program % blocks * QUERIES
    head = program // blocks % heads
    cell = (program // blocks // heads).to(tl.int64)
    first, count = cell_bounds(offsets, cell, entries, faults)
    if (count == 0) | (count > CHUNK):
        shift = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        sums = tl.zeros([QUERIES, DIM], tl.float32)
        for chunk in range(tl.cdiv(count, CHUNK)):
            from_range, from_sums, kept, all_kept = partial_places(
                first // ENTRIES_PER_PLACE + chunk, begin, head, queries, heads, HEAD_DIM, DIM,
                QUERIES,
            )  # fmt: skip
            other = tl.load(normalizers + from_range, mask=kept, other=float("-inf"))
            other_total = tl.load(normalizers + from_range + 1, mask=kept, other=0.0)
            other_sums = tl.load(partials + from_sums, mask=all_kept, other=0.0)
            highest = tl.maximum(shift, other)
            relative_to = tl.where(highest == float("-inf"), 0.0, highest)
            rescale = weigh(shift - relative_to, EXACT)
            other_rescale = weigh(other - relative_to, EXACT)
            total = tl.fma(other_total, other_rescale, total * rescale)
            sums = tl.fma(other_sums, other_rescale[:, None], sums * rescale[:, None])
            shift = highest
        store_output(
            shift, total, sums, output, log_sum_exp, cell, begin, head, queries, heads,
            keep_scale, HEAD_DIM, DIM, QUERIES, EXACT,
        )  # fmt: skip
