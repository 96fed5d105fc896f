"""A Triton kernel that does nothing but exponentials, to measure how many a device can do."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048
STEPS = 4096


@triton.jit
def chain_exponentials(numbers, steps, BLOCK: tl.constexpr = BLOCK):
    """x = 2^-x, ``steps`` times; converges to 0.64, so no number leaves the ordinary range."""
    place = numbers + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(place)
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(place, x)
