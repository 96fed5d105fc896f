"""Matrix products on the matrix units, to the precision of their operands.

An operand is a tuple of *terms*, whose sum is meant: one bf16 or float16 tensor, or two float16
tensors that stand for a float32 one. The matrix units know no float32; two float16 keep 22 bits of
it, and three products make up one (the fourth, of both small terms, is below 2^-22 of it). That is
a third of the float16 rate: twice what three tf32 products would give, and with a third of the
instructions per entry in the cross-attention, because accumulators become operands in place.

float16 ends at 65,504 and 2^-24. So operands are brought near 2^13 by powers of two, which costs no
precision: tables and matrices when they are made (`tables.py`), activations here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def terms_of(x, dtype: tl.constexpr, TERMS: tl.constexpr):
    """float32 x, within the range of ``dtype``, as that many terms."""
    large = x.to(dtype)
    if TERMS == 1:
        return (large,)
    else:
        return large, (x - large.to(tl.float32)).to(dtype)


@triton.jit
def product(a, b, sums):
    """a [m, k] · b [k, n] + sums, for tuples of terms a and b; float32. The smallest come first."""
    if len(a) == 2:
        if len(b) == 2:
            sums = tl.dot(a[0], b[1], sums)
        sums = tl.dot(a[1], b[0], sums)
    return tl.dot(a[0], b[0], sums)


@triton.jit
def scales(largest):
    """2^k with which ``largest`` times it is in [2^12, 2^13), and 2^-k; k at most 107."""
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000  # the exponent
    bits = tl.maximum(bits, 32 << 23)
    up = ((133 << 23) - bits + (133 << 23)).to(tl.float32, bitcast=True)  # 2 · 133 = 254 + 12
    return up, (bits - (12 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_product(a, b, dtype: tl.constexpr, TERMS: tl.constexpr):
    """a [m, k] · b [k, n], float32, for float32 a of any magnitude and terms b."""
    nothing = tl.zeros([a.shape[0], b[0].shape[1]], tl.float32)
    if TERMS == 1:
        return product(terms_of(a, dtype, 1), b, nothing)
    else:
        up, down = scales(tl.max(tl.abs(a), 1))  # of each row
        return product(terms_of(a * up[:, None], dtype, 2), b, nothing) * down[:, None]


@triton.jit
def scaled_terms(b, dtype: tl.constexpr, TERMS: tl.constexpr):
    """Terms of float32 b of any magnitude, and the factor that their product lacks."""
    if TERMS == 1:
        return terms_of(b, dtype, 1), 1.0
    else:
        up, down = scales(tl.max(tl.abs(b)))
        return terms_of(b * up, dtype, 2), down
