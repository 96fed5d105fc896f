"""Which attention weights are dropped: Philox-4x32-10, as `reference.kept` defines it.

A word of the generator belongs to a weight, and four words of one counter to four entries in
succession, so a vector of counters, one per query, makes four vectors of weights: about 200
vector instructions for 64 weights, and no mask is ever kept between forward and backward.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .simd import LANES, never_inline

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_INTS, _LONGS = ir.VectorType(_INT, LANES), ir.VectorType(_LONG, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_FACTORS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85  # of the key from round to round


def _constant(number: int) -> Any:
    return ir.Constant(_INTS, [number] * LANES)


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, lane, ir.Constant(_INTS, [0] * LANES))


def _multiply(builder: Any, words: Any, factor: int) -> tuple[Any, Any]:
    """High and low words of products."""
    wide = builder.mul(builder.zext(words, _LONGS), ir.Constant(_LONGS, [factor] * LANES))
    high = builder.lshr(wide, ir.Constant(_LONGS, [32] * LANES))
    return builder.trunc(high, _INTS), builder.trunc(wide, _INTS)


def _philox(builder: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    """Four vectors of words from four of counters."""
    for _ in range(10):
        first_high, first_low = _multiply(builder, counter[0], _FACTORS[0])
        second_high, second_low = _multiply(builder, counter[2], _FACTORS[1])
        counter = [
            builder.xor(builder.xor(second_high, counter[1]), key[0]), second_low,
            builder.xor(builder.xor(first_high, counter[3]), key[1]), first_low,
        ]  # fmt: skip
        key = [builder.add(word, _constant(step)) for word, step in zip(key, _STEPS, strict=True)]
    return counter


@intrinsic
def _four_rows(typing_context, out, at, row, quarter, cell, column, seed, threshold, factor):
    """`LANES` columns of `keep_factors`, four entries."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, at, row, quarter, cell, column, seed, threshold, factor = arguments

        def word(number: Any) -> Any:
            return _spread(builder, builder.trunc(number, _INT), _INTS)

        columns = builder.add(word(column), ir.Constant(_INTS, list(range(LANES))))
        key = [word(seed), word(builder.lshr(seed, ir.Constant(_LONG, 32)))]
        words = _philox(builder, [word(quarter), word(cell), columns, _constant(0)], key)
        factors, zeros = _spread(builder, factor, _FLOATS), ir.Constant(_FLOATS, [0.0] * LANES)
        least = _spread(builder, threshold, _LONGS)  # which may be 2^32
        for i in range(4):
            kept = builder.icmp_unsigned(">=", builder.zext(words[i], _LONGS), least)
            place = builder.add(at, builder.mul(row, ir.Constant(_LONG, i)))
            target = builder.bitcast(builder.gep(out, [place]), _FLOATS.as_pointer())
            builder.store(builder.select(kept, factors, zeros), target, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.none(out, i, i, i, i, i, i, i, types.float32), generate


@njit(nogil=True)
def keep_factors(out, row, first, count, cell, column, columns, seed, threshold, factor):
    """out[k, j] = ``factor``, or 0 where entry ``first`` + k drops its weight in a column.

    Parameters
    ----------
    out, row
        float32 pointer and the distance of its rows, of which four at a time are written.
    first, count
        Entries, counted within their cell; ``first`` is a multiple of four.
    cell
        Number of the cell.
    column, columns
        The first column, head · queries + query, and their number, a multiple of `LANES`.
    seed, threshold, factor
        int64; a weight is kept where its word is at least ``threshold``, int64; what a kept weight
        is multiplied with, float32.
    """
    never_inline()
    for k in range(0, count, 4):
        for j in range(0, columns, LANES):
            _four_rows(
                out, k * row + j, row, (first + k) // 4, cell, column + j, seed, threshold, factor
            )
