"""How large the tiles of ragged attention's programs are: by type and width, never by the batch.

The compiler keeps what a loop needs in registers, and what does not fit goes to memory and back,
which takes longer than anything else in the loop. These sizes are the largest of those tried that
spill nothing on any architecture (``bench/kernel_resources.py``): 64 queries by 64 entries where
that fits, fewer for the backward, which has three sums and two tiles of weights at once, and for
float32, whose products in three terms need their operands twice. The backward in float32 with heads
of more than 64 spills whatever its tiles: right, but slow. That in 16 bits, with both a bias and
dropped weights, spills 8 bytes of tables on architecture 80, of entries on 100: tiles that do not
take half as many instructions more.

What is padded to: head_dim to a power of two, at least 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .configuration import Configuration


class Shape(NamedTuple):
    """Of a program's tiles."""

    queries: int  # of a block, at most
    configuration: Configuration  # whose tile is in entries


def padded(size: int) -> int:
    """What a tile has of an axis: a power of two, at least the 16 of a matrix product."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def forward_shape(dtype: torch.dtype, dim: int) -> Shape:
    """Of `attend_slots`, for heads padded to ``dim``."""
    if dtype.itemsize == 2:
        return Shape(64, Configuration(64, 4 if dim <= 64 else 8, 1 if dim > 16 else 2))
    if dim == 16:
        return Shape(64, Configuration(64, 4, 2))
    return Shape(64, Configuration(32, 8, 1)) if dim <= 64 else Shape(16, Configuration(32, 8, 1))


def backward_shape(dtype: torch.dtype, dim: int, composed: bool, dropped: bool) -> Shape:
    """Of `differentiate_slots`.

    ``composed``: keys and values come from tables or have parts; ``dropped``: some weights are.
    """
    if dtype.itemsize == 2:
        if dim == 16:
            return Shape(64, Configuration(64, 4, 1 if dropped else 2))
        if dim <= 64 and not composed:
            return Shape(64, Configuration(64, 8, 1))
        return Shape(32, Configuration(32, 8, 1))
    if dim == 16:
        return Shape(32, Configuration(32, 4, 1))
    return Shape(16, Configuration(32, 4, 1)) if dim == 32 else Shape(16, Configuration(16, 8, 1))
