"""The whole encoder on a CPU: what `kernels.encode` calls.

Cells are shared out among threads in blocks; each cell is computed by one thread from its tokens
to its patch features, so a cell's bits depend on nothing but the cell. Tokens and values are
converted to what the kernels read block by block, so that this takes no memory for each entry of
the batch. Tables are kept for the weights used last, see `kept.Kept`.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..kept import Kept
from ..reference import Encoded, mean_over_patches
from ..threads import run_blocks
from ..weights import EncoderWeights
from .attention import GROUP, cross_attend, finish
from .blocks import Blocks, make_block_scratch, make_blocks, run_blocks_of_cell
from .compiled import announce_compilation, digest
from .dropout import NOTHING
from .exact import weigh_entries
from .simd import borrow
from .tables import Tables, make_scratch, make_tables

MOST_CELLS = 64  # per call of compiled code: some milliseconds, so that threads balance


class Prepared(NamedTuple):
    """Everything derived from one set of weights."""

    tables: Tables
    blocks: Blocks


class Batch(NamedTuple):
    """Inputs and outputs of one call of compiled code."""

    offsets: np.ndarray  # int64 [c + 1]
    genes: np.ndarray  # int32 [n]
    values: np.ndarray  # float32 [n]
    pads: np.ndarray  # float32 [c]
    features: np.ndarray  # float32 [c · p · E]
    cross_attention: np.ndarray  # float32 [n · h · p], or empty
    pad_attention: np.ndarray  # float32 [c · h · p], or empty
    self_attention: np.ndarray  # float32 [c · block · h · p · p], or empty


def _prepare(weights: EncoderWeights) -> Prepared:
    return Prepared(make_tables(weights), make_blocks(weights))


kept = Kept(_prepare)


def encode(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    attention: bool = False,
    mean: bool = False,
) -> Encoded:
    """As `reference.encode`, in float32, without gradients. See there for shapes."""
    tables, blocks = kept.of(weights)
    cells, heads, patches, width = len(offsets) - 1, tables.heads, tables.patches, blocks.output_dim
    places = np.ascontiguousarray(offsets.numpy(), np.int64)
    counts = np.zeros(cells, np.float32) if pads is None else pads.float().contiguous().numpy()
    wanted = int(attention)
    self_blocks = blocks.depth - 1
    features = np.empty((cells, patches * width), np.float32)
    cross_attention = np.empty((wanted * len(genes), heads * patches), np.float32)
    pad_attention = np.empty((wanted * cells, heads * patches), np.float32)
    self_attention = np.empty((wanted * cells, self_blocks * heads * patches**2), np.float32)
    values = values.detach()  # `torch.no_grad` is not in force in other threads
    discrete = not values.dtype.is_floating_point

    announce_compilation(_encode, 20)

    own = threading.local()  # a thread's scratch memory

    def task(start: int, stop: int) -> None:
        if not hasattr(own, "scratch"):
            own.scratch = make_scratch(tables), make_block_scratch(blocks)
        first, last = places[start], places[stop]
        batch = Batch(
            places[start : stop + 1] - first,
            genes[first:last].contiguous().numpy().astype(np.int32, copy=False),
            values[first:last].float().contiguous().numpy(),
            counts[start:stop],
            features[start:stop].reshape(-1),
            cross_attention[first:last].reshape(-1),
            pad_attention[start:stop].reshape(-1),
            self_attention[start:stop].reshape(-1),
        )
        _encode(batch, tables, blocks, *own.scratch, discrete, attention, 0, stop - start)

    run_blocks(task, cells, _cells_per_task(cells))
    found = torch.from_numpy(features).view(cells, patches, width)
    if mean:
        found = mean_over_patches(found)
    if not attention:
        return Encoded(found)
    stacked = torch.from_numpy(self_attention).view(cells, self_blocks, heads, patches, patches)
    return Encoded(
        found,
        torch.from_numpy(cross_attention).view(-1, heads, patches),
        torch.from_numpy(pad_attention).view(cells, heads, patches),
        tuple(stacked.unbind(1)),
    )


@njit(nogil=True, inline="always")
def _encode_cells(batch, tables, blocks, scratch, block_scratch, discrete, attention, start, stop):
    """Encode cells start to stop, all arrays behind pointers."""
    patches, lanes, width = blocks.patches, blocks.lanes, blocks.output_dim
    kept = (blocks.depth - 1) * blocks.heads * patches * patches
    for cell in range(start, stop):
        slot = (cell - start) % GROUP
        if slot == 0:
            cross_attend(
                batch.genes, batch.values, batch.offsets, batch.pads,
                cell, min(GROUP, stop - cell), discrete, NOTHING, tables, scratch,
            )  # fmt: skip
        first, last = batch.offsets[cell], batch.offsets[cell + 1]
        finish(
            slot, batch.genes, batch.values, first, last, batch.pads[cell], discrete,
            tables, scratch, block_scratch.mixed,
        )  # fmt: skip
        if attention:
            weigh_entries(batch, first, last, cell, tables, scratch)
        run_blocks_of_cell(blocks, block_scratch, batch.self_attention, cell * kept, attention)
        for p in range(patches):
            place = (cell * patches + p) * width
            for e in range(width):
                batch.features[place + e] = block_scratch.output[e * lanes + p]


def _cached(sources: str) -> Any:
    """`_encode_cells`, compiled once and kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def encode_cells(
        batch, tables, blocks, scratch, block_scratch, discrete, attention, start, stop
    ):
        if len(sources):
            _encode_cells(
                borrow(batch), borrow(tables), borrow(blocks), borrow(scratch),
                borrow(block_scratch), discrete, attention, start, stop,
            )  # fmt: skip

    return encode_cells


def _cells_per_task(cells: int) -> int:
    """Whole groups, several tasks for each thread; fewer cells where there are only few."""
    share = -(-cells // torch.get_num_threads())
    if share <= GROUP:
        return max(1, share)
    return min(MOST_CELLS, max(GROUP, share // 4 // GROUP * GROUP))


_encode = _cached(digest())
