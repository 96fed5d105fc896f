"""Matrix products on the matrix units, to the precision of their operands.

bf16 and float16 operands are multiplied exactly and added in float32. The matrix units know no
float32, so a float32 operand is split into two float16 numbers, which keep 22 bits of it, and three
products make up one (the fourth, of both small parts, is below 2^-22 of it). That is a third of the
float16 rate: twice what three tf32 products would give, and with 60 % fewer instructions per entry
in the cross-attention, because accumulators become operands in place.

float16 ends at 65,504 and 2^-24. So operands are brought near 2^13 by powers of two, which costs no
precision: tables and matrices when they are made (`tables.py`), activations here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(x):
    """float32 x as float16 number + float16 remainder."""
    large = x.to(tl.float16)
    return large, (x - large.to(tl.float32)).to(tl.float16)


@triton.jit
def product(a, b, sums):
    """a [m, k] · b [k, n] + sums; a and b float32 within float16's range, or both bf16 or float16.

    b may be float16 where a is float32: then it is exact.
    """
    if a.dtype == tl.float32:
        large_a, small_a = split(a)
        if b.dtype == tl.float32:
            large_b, small_b = split(b)
            sums = tl.dot(large_a, small_b, sums)
        else:
            large_b = b
        sums = tl.dot(small_a, large_b, sums)
        return tl.dot(large_a, large_b, sums)
    return tl.dot(a, b, sums)


@triton.jit
def scales(largest):
    """2^k with which ``largest`` times it is in [2^12, 2^13), and 2^-k; k at most 107."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000  # the exponent
    bits = tl.maximum(bits, 32 << 23)
    up = ((133 << 23) - bits + (133 << 23)).to(tl.float32, bitcast=True)  # 2 · 133 = 254 + 12
    return up, (bits - (12 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_product(a, b):
    """a [m, k] · b [k, n], float32, for float32 a of any magnitude; b as in `product`."""
    nothing = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if a.dtype == tl.float32:
        up, down = scales(tl.max(tl.abs(a), 1))  # of each row
        return product(a * up[:, None], b, nothing) * down[:, None]
    return product(a, b, nothing)


@triton.jit
def levelled(b):
    """b brought within the range that `product` needs, and the factor that undoes it."""
    if b.dtype == tl.float32:
        up, down = scales(tl.max(tl.abs(b)))
        return b * up, down
    return b, 1.0
