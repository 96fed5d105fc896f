"""Sparse times dense on a GPU: weighted sums of rows in a fixed order, without atomics.

Rows of the result are to their entries what cells are to a batch's, so the slots of `cells.py`
share them out: a program sums a piece of at most CHUNK entries for `WIDTH` columns, and
`segments.sum_slots` adds up the pieces of a row in order. A row that all entries share is summed by
many programs, and none waits for the host.

Bytes per entry and block of columns: 12 of its column and weight, and 4 per number from the second
cache, where a graph's neighbours find what their neighbours have read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import CHUNK
from .cells import chunk_of_slot
from .configuration import Configuration
from .faults import faults, raise_faults
from .launching import launch
from .segments import sum_slots

UNSPECIALIZED = triton.jit(do_not_specialize=["rows", "length", "width"])
SUM, WIDTH = Configuration(32, 4, 1), 64


def multiply(offsets: Tensor, columns: Tensor, entries: Tensor, dense: Tensor) -> Tensor:
    """The product [rows, d] of float32; see `sparse.sparse_product`."""
    device, rows, (length, width) = dense.device, len(offsets) - 1, (len(columns), dense.shape[1])
    raise_faults(device)
    slots, blocks = rows + length // CHUNK.value, triton.cdiv(width, WIDTH)
    partials = torch.empty((slots, width), device=device)
    product = torch.empty((rows, width), device=device)
    launch(
        device, sum_entries, slots * blocks, SUM,
        columns, entries, dense, offsets, partials, faults(device), rows, length, width,
        TILE=SUM.tile, WIDTH=WIDTH,
    )  # fmt: skip
    launch(
        device, sum_slots, rows * blocks, SUM,
        partials, offsets, product, faults(device), rows, length, width, width, 0, WIDTH=WIDTH,
    )  # fmt: skip
    return product


def inner_products(offsets: Tensor, columns: Tensor, left: Tensor, dense: Tensor) -> Tensor:
    """For each entry, its row of ``left`` [rows, d] times its column's row of ``dense``: [n]."""
    device, rows, length, width = dense.device, len(offsets) - 1, len(columns), dense.shape[1]
    raise_faults(device)
    products = torch.empty(length, device=device)
    launch(
        device, multiply_entries, rows + length // CHUNK.value, SUM,
        columns, left, dense, offsets, products, faults(device), rows, length, width,
        TILE=SUM.tile, WIDTH=WIDTH,
    )  # fmt: skip
    return products


@UNSPECIALIZED
def sum_entries(columns, entries, dense, offsets, partials, faults, rows, length, width,
                TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Per slot, the weighted sum of its entries' rows of ``dense`` [.., width]: [slots, width]."""
    blocks = tl.cdiv(width, WIDTH)
    slot = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    _, first, count = chunk_of_slot(slot, offsets, rows, length, faults)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, TILE):
        entry = start + tl.arange(0, TILE)
        column = tl.load(columns + first + entry, mask=entry < count, other=0)
        weight = tl.load(entries + first + entry, mask=entry < count, other=0.0)
        inside = (entry < count)[:, None] & (place < width)[None, :]
        terms = tl.load(dense + column[:, None] * width + place[None, :], mask=inside, other=0.0)
        sums += tl.sum(weight[:, None] * terms, 0)
    tl.store(partials + slot.to(tl.int64) * width + place, sums, mask=place < width)


@UNSPECIALIZED
def multiply_entries(columns, left, dense, offsets, products, faults, rows, length, width,
                     TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Per entry of a slot, its row of ``left`` times its column's row of ``dense``: [n]."""
    row, first, count = chunk_of_slot(tl.program_id(0), offsets, rows, length, faults)
    for start in range(0, count, TILE):
        entry = start + tl.arange(0, TILE)
        column = tl.load(columns + first + entry, mask=entry < count, other=0)
        sums = tl.zeros([TILE], tl.float32)
        for begin in range(0, width, WIDTH):
            place = begin + tl.arange(0, WIDTH)
            of_row = tl.load(left + row.to(tl.int64) * width + place, mask=place < width, other=0.0)
            inside = (entry < count)[:, None] & (place < width)[None, :]
            terms = tl.load(
                dense + column[:, None] * width + place[None, :], mask=inside, other=0.0
            )
            sums += tl.sum(terms * of_row[None, :], 1)
        tl.store(products + first + entry, sums, mask=entry < count)
