"""Patch cross-attention over one chunk of a cell, as Triton functions.

For patch p, head h and the entries i of a cell (design, "The idea that makes it fast"):

    attended(p, h) = sum_i a_i (V[gene_i, h] + value part) / sum_i a_i
    a_i = exp2(q_p · K[gene_i, h] + value part of the score)

Queries and everything added to a score hold the factor log2(e) / sqrt(head_dim), so that a weight
is one `exp2`, the instruction that the hardware has.

What an entry costs, at the paper's sizes (64 patches, 2 heads of 16; both heads together):

- Bytes: 2 to 8 of its gene and value from device memory, once; 128 of its row K | V of both heads,
  one cache line, from L2 or L1 (256 for float32 tables).
- Matrix units: 2,048 multiply-adds for the scores, 2,048 for the sums of V rows, 1,024 for the
  totals: columns (1, v) stand beside the V rows, so that the denominator and the sum of a_i v_i
  need no reduction across threads, and an entry beyond the cell's end is masked where it has 24
  numbers (V and those columns) and not where it has 128 (the weights).
- 128 exponentials, 128 multiply-adds (value part of the score), 64 packed conversions to bf16.

In clocks per entry and multiprocessor of an A100, counted in the machine code of the loop (bench/
results/kernel-resources.md): 8.1 for the exponentials, of which 16 come out per clock; 5.0 on the
matrix units; 4.7 to issue all instructions; 2 for L2. So with bf16 tables the exponentials bound
the kernel, as in the design's roofline. With float32 tables the matrix units do: 14 clocks.

What was weighed against this, by the same count (none of it was timed):

- Ready weights: gather exp2(q · K) instead of K. No exponentials and no product for the scores, but
  320 bytes of a table and 256 of the value's factors per entry, which pass L1 or shared memory
  three times before the matrix units have them as operands: 9 clocks, and 5 of L2 instead of 2.
- Factorised exponentials (gene part times value part) save none of the 128 where K is gathered.
- Exponentials in half precision, two per instruction in PTX, are two instructions in machine code.
- A running maximum, as in FlashAttention: 2 clocks more to issue, and spilled registers. Knowing
  the range beforehand replaces it; where the range is too wide, a pass of its own finds it.
- Persistent programs that loop over cells: the compiler keeps the addresses of all weights in
  registers across the loop, which spills. One cell per program.
- The value part as further columns of K: 2 clocks more on the matrix units, where multiply-adds are
  free beside the exponentials.

The next gain would be a quarter of the exponentials as polynomials on the idle multiply-add units.

Three things in the loop look odd and are there for the compiler:

- Genes and values of the next tile are loaded one tile ahead and carried over. Besides hiding
  latency this keeps the integer types out of what Triton sees behind the matrix product's
  operand: with uint8 values there it chose a layout that cost 200 shuffles and selects per tile,
  and converted each value 32 times.
- The value part is the initial accumulator of the score's product, so adding it is free.
- Entries beyond the end look up gene 0, value 0: an ordinary row, so that its weight is bounded
  like any other, times masked V rows.

Ranges. With the highest and lowest score that any gene can have, known from the tables, and the
chunk's range of values, the exponent's range is known before the loop. Where it is at most `LIMIT`
powers of two, weights are relative to the highest possible score, and nothing that matters
underflows: bf16 ends at 2^-126 as float32 does, and 2^-60 times 70,000 entries stays far above.
Otherwise `find_highest` passes over the chunk first, and weights are relative to what it found. The
choice depends on the chunk alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .product import product, terms_of

# Columns beside the V rows: 1; the value as the tables' type rounds it; what rounding took away.
EXTRA = tl.constexpr(8)
# Entries that are summed before they are merged into a cell's result: by one program or by many,
# but in the same order and to the same bits. A chunk of fewer would merge more often (a merge
# costs as much as 20 entries), one of more would leave a single long cell to fewer programs.
CHUNK = tl.constexpr(1024)
THREADS = tl.constexpr(128)  # of a program, as configurations have it


@triton.jit
def load_entries(genes, values, start, count, gene_rows, bins, TILE: tl.constexpr):
    """Genes int32 [n] and values float32 [n] of one tile; beyond the end, the last entry again.

    Also returns int32 [n]: 1 where a gene has no table row, 2 where a value has no bin, 3 both.
    Those are replaced by 0, so that nothing is read outside a table. ``bins`` is 0 for an affine
    value part. ``count`` is at least 1.
    """
    entry = tl.minimum(start + tl.arange(0, TILE), count - 1)
    if TILE < THREADS:
        # What has fewer elements than a program has threads, the compiler loads, checks and
        # converts anew for every layout that it is needed in: so load copies, one per thread.
        entry = entry[:, None] + tl.zeros([1, THREADS // TILE], tl.int32)
        gene = tl.max(tl.load(genes + entry), 1)
        value = tl.max(tl.load(values + entry), 1).to(tl.float32)
    else:
        gene = tl.load(genes + entry)
        value = tl.load(values + entry).to(tl.float32)
    unknown_gene = (gene < 0) | (gene >= gene_rows)
    unknown_bin = (bins > 0) & (value >= bins)
    gene = tl.where(unknown_gene, 0, gene).to(tl.int32)
    value = tl.where(unknown_bin, 0.0, value)
    return gene, value, unknown_gene.to(tl.int32) + 2 * unknown_bin.to(tl.int32)


@triton.jit
def bound_scores(tables, values, count, PATCHES: tl.constexpr, HEADS: tl.constexpr,
                 BINNED: tl.constexpr):  # fmt: skip
    """Per head, the highest score [p] that an entry can have; the largest spread of any patch;
    the largest magnitude of a value.
    """
    p = tl.arange(0, PATCHES)
    largest, smallest = 0.0, 0.0
    if not BINNED:
        entry = tl.minimum(tl.arange(0, CHUNK), count - 1)
        value = tl.load(values + entry).to(tl.float32)
        largest, smallest = tl.max(value, 0), tl.min(value, 0)
    bounds = ()
    spread = 0.0
    for h in tl.static_range(HEADS):
        slope = tl.load(tables.slope + h * PATCHES + p)
        one, other = largest * slope, smallest * slope
        high = tl.load(tables.highest + h * PATCHES + p) + tl.maximum(one, other)
        low = tl.load(tables.lowest + h * PATCHES + p) + tl.minimum(one, other)
        bounds = bounds + (high,)
        spread = tl.maximum(spread, tl.max(high - low, 0))
    return bounds, spread, tl.maximum(largest, -smallest)


@triton.jit
def find_highest(tables, queries, slopes, genes, values, count, gene_rows, bins,
                 PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 BINNED: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Per head, the highest score [p] of the chunk's entries."""
    highest = ()
    for _ in tl.static_range(HEADS):
        highest = highest + (tl.full([PATCHES], float("-inf"), tl.float32),)
    gene, value, _ = load_entries(genes, values, 0, count, gene_rows, bins, TILE)
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        higher = ()
        for h in tl.static_range(HEADS):
            keys = load_keys(tables, gene, value, h, HEADS, HEAD_DIM, BINNED, TERMS)
            part = slopes[h][:, None] * value[None, :]  # the slope is 0 where BINNED
            scores = product(queries[h], keys, part)  # [p, n]
            higher = higher + (tl.maximum(highest[h], tl.max(scores, 1)),)
        highest = higher
        gene, value, _ = load_entries(genes, values, start + TILE, count, gene_rows, bins, TILE)
    return highest


@triton.jit
def extra_columns(value, inside, dtype: tl.constexpr):
    """(1, v, what rounding took from v, 0 ...) [n, EXTRA]; 0 beyond the end. One exact term."""
    column = tl.arange(0, EXTRA)[None, :]
    rounded = value.to(dtype).to(tl.float32)
    columns = tl.where(column == 1, rounded[:, None], (value - rounded)[:, None])
    columns = tl.where(column == 0, 1.0, columns)
    return (tl.where(inside[:, None] & (column < 3), columns, 0.0).to(dtype),)


@triton.jit
def load_query(tables, h, PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
               TERMS: tl.constexpr):  # fmt: skip
    """Queries [p, d] of head h, in terms."""
    p, d = tl.arange(0, PATCHES)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    query = ()
    for term in tl.static_range(TERMS):
        row = (term * HEADS + h) * PATCHES + p
        query = query + (tl.load(tables.query + row * HEAD_DIM + d),)
    return query


@triton.jit
def load_keys(tables, gene, value, h, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
              BINNED: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """Keys [d, n] of head h, in terms."""
    d = tl.arange(0, HEAD_DIM)[:, None]
    row = ((gene * HEADS + h) * (2 * TERMS * HEAD_DIM))[None, :]
    keys = ()
    for term in tl.static_range(TERMS):
        keys = keys + (tl.load(tables.rows + row + term * HEAD_DIM + d),)
    if BINNED:
        row = ((value.to(tl.int32) * HEADS + h) * (2 * TERMS * HEAD_DIM))[None, :]
        parts = ()
        for term in tl.static_range(TERMS):
            parts = parts + (tl.load(tables.bin_rows + row + term * HEAD_DIM + d),)
        keys = add(keys, parts, TERMS)
    return keys


@triton.jit
def load_rows(tables, gene, value, inside, h, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
              BINNED: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """Value rows [n, d] of head h, in terms; 0 beyond the end."""
    d = tl.arange(0, HEAD_DIM)[None, :] + TERMS * HEAD_DIM
    kept = inside[:, None]
    row = ((gene * HEADS + h) * (2 * TERMS * HEAD_DIM))[:, None]
    rows = ()
    for term in tl.static_range(TERMS):
        rows = rows + (tl.load(tables.rows + row + term * HEAD_DIM + d, mask=kept, other=0.0),)
    if BINNED:
        row = ((value.to(tl.int32) * HEADS + h) * (2 * TERMS * HEAD_DIM))[:, None]
        parts = ()
        for term in tl.static_range(TERMS):
            place = tables.bin_rows + row + term * HEAD_DIM + d
            parts = parts + (tl.load(place, mask=kept, other=0.0),)
        rows = add(rows, parts, TERMS)
    return rows


@triton.jit
def add(a, b, TERMS: tl.constexpr):
    """The sum of two operands in terms."""
    total = a[0].to(tl.float32) + b[0].to(tl.float32)
    if TERMS == 2:
        total += a[1].to(tl.float32) + b[1].to(tl.float32)
    return terms_of(total, a[0].dtype, TERMS)


@triton.jit
def attend_chunk(tables, genes, values, count, gene_rows, bins, PATCHES: tl.constexpr,
                 HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BINNED: tl.constexpr,
                 TERMS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums over at most CHUNK entries that begin at the pointers ``genes`` and ``values``.

    Returns
    -------
    shifts
        Per head, [p]: what exponents are relative to. -inf without entries.
    totals
        Per head, [p, EXTRA]: sums of the weights times `extra_columns`.
    sums
        Per head, [p, d]: sums of the weights times the value rows.
    unknown
        As of `load_entries`, the largest of any entry.
    """
    dtype: tl.constexpr = tables.rows.dtype.element_ty
    # float16, also in the place of float32, ends at 2^16 and 2^-24: weights begin at 2^15 there,
    # and have less room before they need to know the maximum
    LIFT: tl.constexpr = 0.0 if dtype == tl.bfloat16 else 15.0
    LIMIT: tl.constexpr = 60.0 if dtype == tl.bfloat16 else (24.0 if TERMS == 1 else 18.0)
    p = tl.arange(0, PATCHES)
    queries, slopes, totals, sums = (), (), (), ()
    for h in tl.static_range(HEADS):
        queries = queries + (load_query(tables, h, PATCHES, HEADS, HEAD_DIM, TERMS),)
        slopes = slopes + (tl.load(tables.slope + h * PATCHES + p),)
        totals = totals + (tl.zeros([PATCHES, EXTRA], tl.float32),)
        sums = sums + (tl.zeros([PATCHES, HEAD_DIM], tl.float32),)
    highest, spread, magnitude = bound_scores(tables, values, count, PATCHES, HEADS, BINNED)
    if spread > LIMIT:
        highest = find_highest(
            tables, queries, slopes, genes, values, count, gene_rows, bins,
            PATCHES, HEADS, HEAD_DIM, BINNED, TERMS, TILE, STAGES,
        )  # fmt: skip
    shifts = ()
    for h in tl.static_range(HEADS):
        shifts = shifts + (highest[h] - LIFT,)
    # float16 ends at 65,504; values of expression stay far below, but they may be anything
    unit = tl.maximum(magnitude / 32768.0, 1.0)

    gene, value, unknown = load_entries(genes, values, 0, count, gene_rows, bins, TILE)
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        inside = start + tl.arange(0, TILE) < count
        extra = extra_columns(value / unit, inside, dtype)
        new_totals, new_sums = (), ()
        for h in tl.static_range(HEADS):
            keys = load_keys(tables, gene, value, h, HEADS, HEAD_DIM, BINNED, TERMS)
            rows = load_rows(tables, gene, value, inside, h, HEADS, HEAD_DIM, BINNED, TERMS)
            if BINNED:
                part = tl.broadcast_to(-shifts[h][:, None], [PATCHES, TILE])
            else:
                part = slopes[h][:, None] * value[None, :] - shifts[h][:, None]
            scores = product(queries[h], keys, part)  # [p, n]
            weights = terms_of(tl.exp2(scores), dtype, TERMS)
            new_sums = new_sums + (sum_up(weights, rows, sums[h]),)
            new_totals = new_totals + (sum_up(weights, extra, totals[h]),)
        totals, sums = new_totals, new_sums
        gene, value, next_unknown = load_entries(
            genes, values, start + TILE, count, gene_rows, bins, TILE
        )
        unknown = unknown | next_unknown
    of_values = ()
    for h in tl.static_range(HEADS):
        column = tl.arange(0, EXTRA)[None, :]
        of_values = of_values + (totals[h] * tl.where(column == 0, 1.0, unit),)
    return shifts, of_values, sums, tl.max(unknown, 0)


@triton.jit
def sum_up(weights, rows, sums):
    """sums + weights · rows.

    The matrix units round their accumulator towards zero, which would cost float32 tables their
    precision in a long sum: there, a tile is summed from zero and added on the ordinary way.
    """
    if len(weights) == 2:
        return tl.fma(product(weights, rows, tl.zeros_like(sums)), 1.0, sums)
    else:
        return product(weights, rows, sums)


@triton.jit
def merge(shift, total, sums, other_shift, other_total, other_sums):
    """Two partial results [p], [p, EXTRA], [p, d], each relative to its shift, made one.

    Written with explicit fused multiply-adds: a cell's chunks are merged by different kernels
    depending on how the work was shared out, and must come to the same bits.
    """
    shift_of_both = tl.maximum(shift, other_shift)
    # both are -inf where there is nothing yet: any finite number does
    relative_to = tl.where(shift_of_both == float("-inf"), 0.0, shift_of_both)
    factor = tl.exp2(shift - relative_to)[:, None]
    other_factor = tl.exp2(other_shift - relative_to)[:, None]
    return (
        shift_of_both,
        tl.fma(other_total, other_factor, total * factor),
        tl.fma(other_sums, other_factor, sums * factor),
    )
