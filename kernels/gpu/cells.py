"""The kernels: a cell from its entries to its features.

`encode_cells` does all of it for whole cells: between reading a cell's entries and writing its
features nothing goes to device memory. Where a batch has too few cells to fill the GPU,
`attend_chunks` first sums the chunks of all cells, each in a program of its own, and `encode_cells`
merges them (SPLIT). Both ways sum the same chunks and merge them in the same order, so which one
ran cannot be seen in a cell's bits.

Chunks are found without any table of them. Slot `cell + offsets[cell] // CHUNK` and those after it
belong to a cell: a cell of n entries then owns at least ceil(n / CHUNK) slots, slots rise from cell
to cell, and there are `cells + entries // CHUNK` of them, which the host knows from shapes alone.
The cell of a slot is found by bisection; a slot that the cell does not need (one per cell at most)
ends at once.

Nothing waits for the host: what is wrong with the input (a gene without a table row, decreasing
offsets) is replaced by something harmless and recorded in `faults`, see `faults.py`.

Memory: inputs, outputs and tables; with SPLIT also 4 * HEADS * PATCHES * (HEAD_DIM + 9) bytes per
slot, 12.8 KB at the paper's sizes, and then there are few cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import CHUNK, EXTRA, attend_chunk, load_entries, load_keys, load_query, merge
from .blocks import affine, multiply, run_blocks
from .product import product

# One compilation for all batches: not another for counts that are 1 or divisible by 16, nor for
# inputs that begin within 16 bytes (entries of a cell do anyway).
UNSPECIALIZED = triton.jit(
    do_not_specialize=["cells", "entries", "gene_rows", "bins", "patches", "dim", "output_dim"],
    do_not_specialize_on_alignment=["offsets", "genes", "values", "pads"],
)
BAD_OFFSETS = tl.constexpr(2)  # place in `faults`; 0 is a gene, 1 a value, 3 a number of pads
BAD_PADS = tl.constexpr(3)


@triton.jit
def cell_bounds(offsets, cell, entries, faults):
    """First entry (int64) and number of entries (int32) of a cell, as far as they exist."""
    first, last = tl.load(offsets + cell).to(tl.int64), tl.load(offsets + cell + 1).to(tl.int64)
    wrong = (first < 0) | (last < first) | (last > entries) | ((cell == 0) & (first != 0))
    tl.store(faults + BAD_OFFSETS, 1, mask=wrong)
    first = tl.minimum(tl.maximum(first, 0), entries)
    last = tl.minimum(tl.maximum(last, first), entries)
    return first, (last - first).to(tl.int32)


@triton.jit
def report_unknown(unknown, faults):
    tl.store(faults, 1, mask=(unknown & 1) != 0)
    tl.store(faults + 1, 1, mask=(unknown & 2) != 0)


@triton.jit
def nothing(PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What a cell's chunks are merged into: shifts, totals and sums of no entry."""
    shifts, totals, sums = (), (), ()
    for _ in tl.static_range(HEADS):
        shifts = shifts + (tl.full([PATCHES], float("-inf"), tl.float32),)
        totals = totals + (tl.zeros([PATCHES, EXTRA], tl.float32),)
        sums = sums + (tl.zeros([PATCHES, HEAD_DIM], tl.float32),)
    return shifts, totals, sums


@triton.jit
def merge_heads(merged, other, HEADS: tl.constexpr):
    shifts, totals, sums = (), (), ()
    for h in tl.static_range(HEADS):
        shift, total, sum_ = merge(
            merged[0][h], merged[1][h], merged[2][h], other[0][h], other[1][h], other[2][h]
        )
        shifts = shifts + (shift,)
        totals = totals + (total,)
        sums = sums + (sum_,)
    return shifts, totals, sums


@triton.jit
def partial_place(partials, slot, h, PATCHES: tl.constexpr, HEADS: tl.constexpr,
                  HEAD_DIM: tl.constexpr):  # fmt: skip
    """Where head h of a slot keeps shift [p], totals [p, EXTRA] and sums [p, d]: pointers."""
    p, column, d = tl.arange(0, PATCHES), tl.arange(0, EXTRA), tl.arange(0, HEAD_DIM)
    place = partials + (slot * HEADS + h) * (PATCHES * (1 + EXTRA + HEAD_DIM))
    totals = place + PATCHES + p[:, None] * EXTRA + column[None, :]
    sums = place + PATCHES * (1 + EXTRA) + p[:, None] * HEAD_DIM + d[None, :]
    return place + p, totals, sums


@triton.jit
def chunk_of_slot(slot, offsets, cells, entries, faults):
    """The cell of a slot, the first entry of its chunk, and the chunk's entries, 0 if idle."""
    slot = slot.to(tl.int64)
    cell, above = slot * 0, slot * 0 + cells
    while above - cell > 1:  # the last cell whose first slot is not beyond this one
        middle = (cell + above) // 2
        beyond = middle + tl.load(offsets + middle).to(tl.int64) // CHUNK > slot
        above = tl.where(beyond, middle, above)
        cell = tl.where(beyond, cell, middle)
    first, count = cell_bounds(offsets, cell, entries, faults)
    done = (slot - cell - first // CHUNK) * CHUNK
    count = tl.where(done < 0, 0, tl.minimum(tl.maximum(count - done, 0), CHUNK))
    return cell, first + done, count.to(tl.int32)


@UNSPECIALIZED
def attend_chunks(offsets, genes, values, tables, partials, faults, cells, entries, gene_rows, bins,
                  PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  BINNED: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """One chunk per program: its partial sums to ``partials``."""
    slot = tl.program_id(0)
    _, first, count = chunk_of_slot(slot, offsets, cells, entries, faults)
    if count > 0:
        shifts, totals, sums, unknown = attend_chunk(
            tables, genes + first, values + first, count, gene_rows, bins,
            PATCHES, HEADS, HEAD_DIM, BINNED, TERMS, TILE, STAGES,
        )  # fmt: skip
        report_unknown(unknown, faults)
        for h in tl.static_range(HEADS):
            to_shift, to_totals, to_sums = partial_place(
                partials, slot.to(tl.int64), h, PATCHES, HEADS, HEAD_DIM
            )
            tl.store(to_shift, shifts[h])
            tl.store(to_totals, totals[h])
            tl.store(to_sums, sums[h])


@triton.jit
def add_pads(merged, tables, pads, PATCHES: tl.constexpr, HEADS: tl.constexpr,
             HEAD_DIM: tl.constexpr):  # fmt: skip
    """Merge the padding tokens of a cell, all alike, as one entry of weight ``pads``."""
    p, d, column = tl.arange(0, PATCHES), tl.arange(0, HEAD_DIM), tl.arange(0, EXTRA)
    shifts, totals, sums = (), (), ()
    for h in tl.static_range(HEADS):
        score = tl.load(tables.pad_score + h * PATCHES + p)
        row = tl.load(tables.pad_row + h * HEAD_DIM + d)
        shifts = shifts + (tl.where(pads > 0, score, float("-inf")),)
        total = tl.where(column == 0, pads, 0.0)[None, :]
        totals = totals + (tl.broadcast_to(total, [PATCHES, EXTRA]),)
        sums = sums + (tl.broadcast_to((pads * row)[None, :], [PATCHES, HEAD_DIM]),)
    return merge_heads(merged, (shifts, totals, sums), HEADS)


@triton.jit
def attend(totals, sums, tables, h, HEAD_DIM: tl.constexpr, BINNED: tl.constexpr):
    """Attended values [p, d] of head h, and what they were divided by [p]: 1 for nothing."""
    d, column = tl.arange(0, HEAD_DIM), tl.arange(0, EXTRA)[None, :]
    total = tl.sum(tl.where(column == 0, totals, 0.0), 1)  # [p]
    if not BINNED:
        of_values = tl.sum(tl.where((column == 1) | (column == 2), totals, 0.0), 1)  # [p]
        slope = tl.load(tables.value_row + h * HEAD_DIM + d)
        sums = tl.fma(of_values[:, None], slope[None, :], sums)
    constant = tl.load(tables.constant_row + h * HEAD_DIM + d)
    divisor = tl.where(total == 0.0, 1.0, total)  # of a cell that attends to nothing
    attended = sums * (tl.load(tables.row_unscale + h) / divisor)[:, None]
    attended += tl.where(total == 0.0, 0.0, 1.0)[:, None] * constant[None, :]
    return attended, divisor


@UNSPECIALIZED
def encode_cells(offsets, genes, values, pads, tables, partials, features, normalizers, faults,
                 cells, entries, gene_rows, bins, patches, dim, output_dim,
                 PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 DIM: tl.constexpr, MLP: tl.constexpr, OUTPUT: tl.constexpr, DEPTH: tl.constexpr,
                 BINNED: tl.constexpr, TERMS: tl.constexpr, PADDED: tl.constexpr,
                 PROJECTED: tl.constexpr, MEAN: tl.constexpr, SPLIT: tl.constexpr,
                 TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One cell per program: its features, or with DEPTH = 0 its attended values.

    ``features`` is float32 [c, patches, output_dim], or [c, output_dim] with MEAN. With DEPTH = 0
    it holds attended values [c, patches, HEADS, head_dim], where ``dim`` is head_dim, and
    ``normalizers`` [2, c, HEADS, patches] what exponents are relative to, and sums of exponentials.
    Their logarithm would be one number, but float32 holds that of a score of hundreds to 1e-5 only.
    """
    p = tl.arange(0, PATCHES)
    cell = tl.program_id(0).to(tl.int64)
    first, count = cell_bounds(offsets, cell, entries, faults)
    merged = nothing(PATCHES, HEADS, HEAD_DIM)
    for done in range(0, count, CHUNK):
        if SPLIT:
            slot = cell + first // CHUNK + done // CHUNK
            shifts, totals, sums = (), (), ()
            for h in tl.static_range(HEADS):
                from_shift, from_totals, from_sums = partial_place(
                    partials, slot, h, PATCHES, HEADS, HEAD_DIM
                )
                shifts = shifts + (tl.load(from_shift),)
                totals = totals + (tl.load(from_totals),)
                sums = sums + (tl.load(from_sums),)
        else:
            rest = tl.minimum(count - done, CHUNK)
            shifts, totals, sums, unknown = attend_chunk(
                tables, genes + first + done, values + first + done, rest, gene_rows, bins,
                PATCHES, HEADS, HEAD_DIM, BINNED, TERMS, TILE, STAGES,
            )  # fmt: skip
            report_unknown(unknown, faults)
        merged = merge_heads(merged, (shifts, totals, sums), HEADS)
    if PADDED:
        number = tl.load(pads + cell)
        tl.store(faults + BAD_PADS, 1, mask=number < 0)
        number = tl.maximum(number.to(tl.float32), 0.0)
        merged = add_pads(merged, tables, number, PATCHES, HEADS, HEAD_DIM)

    if DEPTH == 0:
        d = tl.arange(0, HEAD_DIM)
        for h in tl.static_range(HEADS):
            attended, divisor = attend(merged[1][h], merged[2][h], tables, h, HEAD_DIM, BINNED)
            row = (cell * patches + p)[:, None] * HEADS + h
            kept = (p[:, None] < patches) & (d[None, :] < dim)
            tl.store(features + row * dim + d[None, :], attended, mask=kept)
            place = (cell * HEADS + h) * patches + p
            tl.store(normalizers + place, merged[0][h], mask=p < patches)
            place += cells.to(tl.int64) * HEADS * patches
            tl.store(normalizers + place, divisor, mask=p < patches)
    else:
        unscale = tl.load(tables.unscale)
        x = tl.load(tables.patches + p[:, None] * DIM + tl.arange(0, DIM)[None, :])
        for h in tl.static_range(HEADS):
            attended, _ = attend(merged[1][h], merged[2][h], tables, h, HEAD_DIM, BINNED)
            matrix = tables.matrices + TERMS * (3 * HEADS + h) * DIM * HEAD_DIM
            x += multiply(attended, matrix, unscale, HEAD_DIM, DIM, TERMS)
        x, matrices, vectors = run_blocks(
            x, tables.matrices, tables.vectors, unscale, patches, dim,
            DEPTH, PATCHES, HEADS, HEAD_DIM, DIM, MLP, TERMS,
        )  # fmt: skip
        if PROJECTED:
            x = affine(x, matrices, vectors, unscale, DIM, OUTPUT, TERMS)
        column = tl.arange(0, OUTPUT)
        if MEAN:
            x = tl.sum(tl.where(p[:, None] < patches, x, 0.0), 0) / patches
            place = features + cell * output_dim + column
            tl.store(place, x, mask=column < output_dim)
        else:
            row = (cell * patches + p)[:, None] * output_dim
            kept = (p[:, None] < patches) & (column[None, :] < output_dim)
            tl.store(features + row + column[None, :], x, mask=kept)


@UNSPECIALIZED
def weigh_entries(offsets, genes, values, tables, normalizers, weights, faults,
                  cells, entries, gene_rows, bins, patches,
                  PATCHES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  BINNED: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Attention weights [n, HEADS, patches] of one chunk, from `encode_cells`'s ``normalizers``."""
    p = tl.arange(0, PATCHES)
    cell, first, count = chunk_of_slot(tl.program_id(0), offsets, cells, entries, faults)
    of_chunk = weights + first * (HEADS * patches)  # within it, places fit 32 bits
    for start in range(0, count, TILE):
        entry = start + tl.arange(0, TILE)
        inside = entry < count
        gene, value, _ = load_entries(
            genes + first, values + first, start, count, gene_rows, bins, TILE
        )
        for h in tl.static_range(HEADS):
            row = h * PATCHES + p
            query = load_query(tables, h, PATCHES, HEADS, HEAD_DIM, TERMS)
            keys = load_keys(tables, gene, value, h, HEADS, HEAD_DIM, BINNED, TERMS)
            part = tl.load(tables.slope + row)[:, None] * value[None, :]
            normalizer = normalizers + (cell * HEADS + h) * patches + p
            shift = tl.load(normalizer, mask=p < patches)
            normalizer += cells.to(tl.int64) * HEADS * patches
            divisor = tl.load(normalizer, mask=p < patches, other=1.0)
            scores = product(query, keys, part - shift[:, None])  # [p, n]
            place = (entry * HEADS + h)[None, :] * patches + p[:, None]
            kept = (p[:, None] < patches) & inside[None, :]
            tl.store(of_chunk + place, tl.exp2(scores) / divisor[:, None], mask=kept)
