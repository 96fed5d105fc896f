"""Sums over stretches of rows, in a fixed order: what makes gradients deterministic.

A table's gradient is the sum, for each of its rows, of the gradients of all entries that looked the
row up. Sorted by that row, the entries of one lie side by side: a table's rows are to them what
cells are to a batch's entries. So the slots of `cells.py` share them out in the same way: pieces of
at most CHUNK entries, found without waiting for the host, summed by a program each (`sum_pieces`)
and added up in order (`sum_slots`). A row that all entries share is summed by many programs, and
rows that nobody looked up get 0.

Bytes per entry: its gradients once from device memory, 4 per number, and 12 of its sorted row and
number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import CHUNK
from .cells import cell_bounds, chunk_of_slot

UNSPECIALIZED = triton.jit(
    do_not_specialize=["segments", "length", "width", "stride", "column"],
)


@UNSPECIALIZED
def sum_pieces(rows, order, offsets, partials, faults, segments, length, width,
               TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Per slot, the sum of ``rows[order]`` [length, width] over its piece: [slots, width]."""
    blocks = tl.cdiv(width, WIDTH)
    slot = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    _, first, count = chunk_of_slot(slot, offsets, segments, length, faults)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, TILE):
        entry = start + tl.arange(0, TILE)
        row = tl.load(order + first + entry, mask=entry < count, other=0)
        kept = (entry < count)[:, None] & (column < width)[None, :]
        sums += tl.sum(tl.load(rows + row[:, None] * width + column, mask=kept, other=0.0), 0)
    tl.store(partials + slot.to(tl.int64) * width + column, sums, mask=column < width)


@UNSPECIALIZED
def sum_slots(partials, offsets, sums, faults, segments, length, width, stride, column,
              WIDTH: tl.constexpr):  # fmt: skip
    """Per segment, the sum of ``partials`` [slots, width] over its slots, in their order.

    ``sums`` is [segments, stride], of any floating type; written are ``width`` numbers of each row
    from ``column`` on.
    """
    blocks = tl.cdiv(width, WIDTH)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    first, count = cell_bounds(offsets, segment, length, faults)
    slot = segment + first // CHUNK
    total = tl.zeros([WIDTH], tl.float32)
    for piece in range(tl.cdiv(count, CHUNK)):
        total += tl.load(partials + (slot + piece) * width + place, mask=place < width, other=0.0)
    to = sums + segment * stride + column + place
    tl.store(to, total.to(sums.dtype.element_ty), mask=place < width)
