"""Which attention weights are dropped: Philox-4x32-7, as `reference.kept` defines it.

The four words of a counter belong to four neighbouring queries of one entry. So vectors along the
queries need no other entry's words, entries may come in any order, and no mask is ever kept
between forward and backward.

Of the seven rounds, an entry's number meets what all entries of a cell share (the cell's number and
the column) in the third only: what the first two make of the latter is made once for a cell, by
`begin_words`, and what they make of the former is scalar. Each of the other five takes 6 vector
instructions for 8 counters, which is `UNIT` queries: two multiplications, two shifts and two
logical operations, on words that lie in the lower halves of 64 bits, where machines multiply them.
Measured alone, 45 ns for the 128 weights of an entry at the paper's sizes; ten rounds took 1.5
times as long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..ragged import RaggedAttention
from .simd import LANES, aligned
from .vector_math import multiply, multiply_difference, multiply_subtract

F32 = np.float32

ROUNDS = 7
UNIT = 32  # queries that 8 counters serve
_COUNTERS = 8
_KEYS = 16  # words that a cell's begin with: two for each round, in whole cache lines
_COLUMNS = 3 * _COUNTERS  # words for each unit, after the keys
_FIRST, _SECOND = 0xD2511F53, 0xCD9E8D57  # what words are multiplied with
_FIRST_STEP, _SECOND_STEP = 0x9E3779B9, 0xBB67AE85  # of the key from round to round
_WORD = 2**32 - 1

_INT, _LONG = ir.IntType(32), ir.IntType(64)
_INTS, _LONGS = ir.VectorType(_INT, LANES), ir.VectorType(_LONG, _COUNTERS)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


class Dropout(NamedTuple):
    """How weights are dropped, as compiled code sees it."""

    threshold: int  # a smaller word drops its weight: 0 drops nothing
    factor: np.float32  # of what is kept: 1 / (1 - probability); 0 where all is dropped
    seed: int


NOTHING = Dropout(0, F32(1.0), 0)  # is dropped


def make_dropout(problem: RaggedAttention) -> Dropout:
    if problem.seed is None:
        return NOTHING
    threshold = round(problem.dropout * 2**32)
    factor = 0.0 if threshold == 2**32 else 1.0 / (1.0 - problem.dropout)
    return Dropout(threshold, F32(factor), int(problem.seed))


def make_words(queries: int, heads: int = 1) -> np.ndarray:
    """Memory for the words of a cell, int64: `count_words` for each head."""
    return aligned(2 * heads * count_words(queries)).view(np.int64)


@njit(nogil=True, cache=True)
def count_words(queries):
    """Words of a cell and head: whole cache lines."""
    return _KEYS + (queries + UNIT - 1) // UNIT * _COLUMNS


@njit(nogil=True)
def begin_words(words, at, dropout, cell, h, first_query, queries, count):
    """Prepare `drop_weights` for a cell and head.

    Parameters
    ----------
    words, at
        int64 pointer, and where to write what `make_words` has room for.
    cell, h
        Numbers of the cell in its batch and of the head.
    first_query, queries, count
        The first query, which is a multiple of four, of how many; and for how many of them.
    """
    first_key, second_key = dropout.seed & _WORD, (dropout.seed >> 32) & _WORD
    for i in range(ROUNDS):
        words[at + 2 * i], words[at + 2 * i + 1] = first_key, second_key
        first_key, second_key = (
            (first_key + _FIRST_STEP) & _WORD,
            (second_key + _SECOND_STEP) & _WORD,
        )
    column = h * ((queries + 3) // 4) + first_query // 4
    for unit in range((count + UNIT - 1) // UNIT):
        place = at + _KEYS + unit * _COLUMNS
        for i in range(_COUNTERS):
            # 0, 4, 1, 5, 2, 6, 3, 7: as `_sort` takes every other one
            counter = column + unit * _COUNTERS + i % 2 * 4 + i // 2
            second = np.uint64(counter) * np.uint64(_SECOND)
            mixed = (second >> np.uint64(32)) ^ np.uint64(cell) ^ np.uint64(words[at])
            first = (mixed & np.uint64(_WORD)) * np.uint64(_FIRST)
            words[place + i] = np.int64(second & np.uint64(_WORD))
            words[place + _COUNTERS + i] = np.int64(first >> np.uint64(32))
            words[place + 2 * _COUNTERS + i] = np.int64(first & np.uint64(_WORD))


@njit(nogil=True, inline="always")
def drop_weights(out, out_at, weights, weights_at, words, at, entry, count, dropout):
    """out[out_at + j] = weights[weights_at + j] · factor, or 0 where query j drops the entry.

    Parameters
    ----------
    out, out_at, weights, weights_at
        float32 pointers and where a row of ``count`` numbers, a multiple of `LANES`, begins; they
        may be the same.
    words, at
        What `begin_words` prepared.
    entry
        Number of the entry within its cell.
    """
    threshold, factor, j = dropout.threshold, dropout.factor, 0
    while j < count:
        to, source, place = out_at + j, weights_at + j, at + _KEYS + j // UNIT * _COLUMNS
        if count - j >= 2 * UNIT:
            _drop_64(out, to, weights, source, words, at, place, entry, threshold, factor)
            j += 2 * UNIT
        elif count - j >= UNIT:
            _drop_32(out, to, weights, source, words, at, place, entry, threshold, factor)
            j += UNIT
        else:
            _drop_16(out, to, weights, source, words, at, place, entry, threshold, factor)
            j += LANES


@njit(nogil=True, inline="always")
def differentiate_scores(products, weights, kept, delta, at, entries, lanes, dropout):
    """products = kept · products - weights · delta: gradients of a tile's scores.

    Parameters
    ----------
    products, weights, kept
        float32 pointers to [entries, lanes]: gradient · value, weights, and what `drop_weights`
        left of them (else, where nothing is dropped, ``weights``). Dropping changes ``weights``.
    delta, at
        float32 pointer to [lanes], from ``at`` on.
    """
    for start in range(0, entries * lanes, lanes):
        if dropout.threshold > 0:
            multiply((), weights, start, weights, start, delta, at, lanes)
        else:
            multiply_difference((), products, start, kept, start, products, start, delta, at, lanes)
    if dropout.threshold > 0:
        multiply_subtract((), products, 0, kept, 0, products, 0, weights, 0, entries * lanes)


def _constant(number: int, kind: Any) -> Any:
    return ir.Constant(kind, number if kind == _LONG else [number] * kind.count)


def _spread(builder: Any, scalar: Any, kind: Any) -> Any:
    """A number in all lanes."""
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, lane, _constant(0, ir.VectorType(_INT, kind.count)))


def _multiply(builder: Any, word: Any, factor: int) -> tuple[Any, Any]:
    """High and low word of a product; a word is the lower half of 64 bits, the rest arbitrary."""
    kind = word.type
    word = builder.and_(word, _constant(_WORD, kind))
    product = builder.mul(word, _constant(factor, kind))
    return builder.lshr(product, _constant(32, kind)), product


def _mix(builder: Any, state: list[Any], keys: list[Any]) -> list[Any]:
    """One round of Philox."""
    first_high, first_low = _multiply(builder, state[0], _FIRST)
    second_high, second_low = _multiply(builder, state[2], _SECOND)
    return [
        builder.xor(builder.xor(second_high, state[1]), keys[0]), second_low,
        builder.xor(builder.xor(first_high, state[3]), keys[1]), first_low,
    ]  # fmt: skip


def _sort(builder: Any, state: list[Any], half: int) -> Any:
    """Words of `LANES` queries: all four of counters 0, 2, 4 and 6, or of 1, 3, 5 and 7."""
    even_and_odd = [i + (LANES - 1) * (i % 2) for i in range(LANES)]
    words = [builder.bitcast(word, _INTS) for word in state]
    first, second = (
        builder.bitcast(
            builder.shuffle_vector(words[i], words[i + 1], ir.Constant(_INTS, even_and_odd)), _LONGS
        )
        for i in (0, 2)
    )
    pairs = [2 * (i // 2) + half + _COUNTERS * (i % 2) for i in range(_COUNTERS)]
    order = ir.Constant(ir.VectorType(_INT, _COUNTERS), pairs)
    return builder.bitcast(builder.shuffle_vector(first, second, order), _INTS)


def _make_drop(vectors: int) -> Any:
    """An intrinsic for some vectors of weights. Units go through the rounds side by side."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, out_at, weights, weights_at, words, at, place, entry, threshold, factor = arguments

        def vector(data: Any, start: Any, offset: int, kind: Any = _FLOATS) -> Any:
            place = builder.gep(data, [builder.add(start, ir.Constant(_LONG, offset))])
            return builder.bitcast(place, kind.as_pointer())

        def key(of_round: int, which: int) -> Any:
            offset = ir.Constant(_LONG, 2 * of_round + which)
            return builder.load(builder.gep(words, [builder.add(at, offset)]))

        def column(unit: int, which: int) -> Any:
            offset = unit * _COLUMNS + which * _COUNTERS
            return builder.load(vector(words, place, offset, _LONGS), align=8)

        high, low = _multiply(builder, entry, _FIRST)
        mixed_high, mixed_low = _multiply(builder, builder.xor(high, key(0, 1)), _SECOND)
        of_entry = [builder.xor(mixed_high, key(1, 0)), mixed_low, builder.xor(low, key(1, 1))]
        of_entry = [_spread(builder, word, _LONGS) for word in of_entry]
        states = [  # four vectors of words for each unit
            [
                builder.xor(column(unit, 0), of_entry[0]), of_entry[1],
                builder.xor(column(unit, 1), of_entry[2]), column(unit, 2),
            ]
            for unit in range(-(-vectors // 2))
        ]  # fmt: skip
        for i in range(2, ROUNDS):
            keys = [_spread(builder, key(i, which), _LONGS) for which in range(2)]
            states = [_mix(builder, state, keys) for state in states]
        least = _spread(builder, builder.trunc(threshold, _INT), _INTS)
        factors, zeros = _spread(builder, factor, _FLOATS), _constant(0, _FLOATS)
        for i in range(vectors):
            kept = builder.icmp_unsigned(">=", _sort(builder, states[i // 2], i % 2), least)
            weight = builder.load(vector(weights, weights_at, i * LANES), align=4)
            weight = builder.select(kept, builder.fmul(weight, factors), zeros)
            builder.store(weight, vector(out, out_at, i * LANES), align=4)
        return context.get_dummy_value()

    @intrinsic
    def drop(
        typing_context, out, out_at, weights, weights_at, words, at, place, entry, threshold, factor
    ):
        i = types.int64
        return types.none(out, i, weights, i, words, i, i, i, i, types.float32), generate

    return drop


_drop_64, _drop_32, _drop_16 = (_make_drop(vectors) for vectors in (4, 2, 1))
