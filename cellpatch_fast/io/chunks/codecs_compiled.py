"""The codecs that no library undoes outside the GIL, as loops compiled by Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

ZERO, ONE, TWO, FIVE, EIGHT, HIGH = (np.uint64(number) for number in (0, 1, 2, 5, 8, 31))
DAMAGED = np.int64(-1)


@njit(nogil=True, cache=True)
def accumulate(values: np.ndarray) -> None:
    """Replace unsigned differences by their running sums, which wrap around.

    The sum is a full word, of which an element keeps the lower bits: a sum of the elements' own
    type would be cut at every step, which takes twice as long.
    """
    total = np.uint64(0)
    for place in range(len(values)):
        total += values[place]
        values[place] = total


@njit(nogil=True, cache=True)
def unshuffle(packed: np.ndarray, out: np.ndarray, element: int) -> None:
    """Put the bytes of each element of ``element`` bytes together again; both uint8, as long.

    What is left over behind the last whole element is not shuffled.
    """
    count = len(out) // element
    if element == 4:  # four streams in one pass, which is what the compiler makes vectors of
        for place in range(count):
            out[4 * place] = packed[place]
            out[4 * place + 1] = packed[count + place]
            out[4 * place + 2] = packed[2 * count + place]
            out[4 * place + 3] = packed[3 * count + place]
    else:
        for byte in range(element):
            for place in range(count):
                out[element * place + byte] = packed[byte * count + place]
    out[element * count :] = packed[element * count :]


@njit(nogil=True, cache=True)
def unpack_lzf(packed: np.ndarray, out: np.ndarray) -> np.int64:
    """Decode a block of LibLZF, uint8 to uint8; returns the bytes written.

    The block is a sequence of literal runs (a byte below 32: one less than their length) and of
    copies from what was decoded before (3 bits of length, 13 of distance, and a byte more of
    length where its 3 bits are all set). A block that would read or write out of bounds is
    damaged: -1. Counting is unsigned: negative indices, which would count from the end, would
    cost a third more.
    """
    source, target = ZERO, ZERO
    packed_size, size = np.uint64(len(packed)), np.uint64(len(out))
    while source < packed_size:
        control = np.uint64(packed[source])
        source += ONE
        if control < 32:
            length = control + ONE
            if source + length > packed_size or target + length > size:
                return DAMAGED
            for _ in range(length):
                out[target] = packed[source]
                source += ONE
                target += ONE
            continue
        length = control >> FIVE
        long = np.uint64(length == 7)
        if source + ONE + long > packed_size:
            return DAMAGED
        if long:
            length += np.uint64(packed[source])
            source += ONE
        length += TWO
        distance = ((control & HIGH) << EIGHT) + np.uint64(packed[source]) + ONE
        source += ONE
        if distance > target or target + length > size:
            return DAMAGED
        for _ in range(length):  # may overlap: it repeats what it has just written
            out[target] = out[target - distance]
            target += ONE
    return np.int64(target)
