"""The vector code: exact chains of fused multiply-adds, and functions right to a few units.

Bounds are stated where they are asserted; one unit in the last place of float32 is 6e-8 to 1.2e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from cellpatch_fast.kernels.cpu import vector_math
from cellpatch_fast.kernels.cpu.simd import LANES, borrow, multiply_add
from numba import njit
from scipy.special import ndtr

F32 = np.float32


# --- multiply_add ------------------------------------------------------------------------------


class Matrices(NamedTuple):
    c: np.ndarray
    a: np.ndarray
    b: np.ndarray


@njit
def product(matrices, c_at, c_row, rows, columns, a_at, a_row, a_column, b_at, b_row, count):
    m = borrow(matrices)
    multiply_add(
        m.c, c_at, c_row, rows, columns, m.a, a_at, a_row, a_column, m.b, b_at, b_row, count
    )  # fmt: skip


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a · b + c, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd there (to the neighbour with
    an odd last bit wherever it is not exact), so that the second rounding cannot go astray.
    """
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = p + c
    part = total - p
    error = (p - (total - part)) + (c - part)  # exactly what rounding took
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    return (bits + even * np.where((error > 0) == (total > 0), 1, -1)).view(np.float64).astype(F32)


def test_the_expected_fused_multiply_add_is_right() -> None:
    """On random numbers and just beside half-way cases, which rounding twice gets wrong."""
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 300)).astype(F32)
    c *= F32(2.0) ** random.integers(-40, 40, 300).astype(F32)
    a[:2], b[:2] = 2**-12 * (1 + 2**-23), 2**-12 * (1 - 2**-23)
    c[:2] = 1 + 2**-23, 1  # the sums lie 2^-70 below a tie
    for found, *given in zip(fused(a, b, c), a, b, c, strict=True):
        x, y, z = (Fraction(float(number)) for number in given)
        distances = [
            abs(Fraction(float(near)) - (x * y + z))
            for near in (found, np.nextafter(found, F32(-np.inf)), np.nextafter(found, F32(np.inf)))
        ]
        assert distances[0] == min(distances)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_every_tile_remainder_is_one_chain_in_order(
    vectors: int, count: int, transposed: bool
) -> None:
    """1 to 19 rows, 16 to 144 columns: a chain of fused multiply-adds over k, added to c."""
    random = np.random.default_rng(vectors + count)
    columns, gap, start = vectors * LANES, 3, 5
    for rows in range(1, 20):
        c, b = random.standard_normal((2, 60, columns + gap)).astype(F32)
        a = random.standard_normal((19, 41)).astype(F32)
        used = a[:rows, :count]
        stored = np.ascontiguousarray(a.T if transposed else a)
        matrices = Matrices(*(np.pad(m.ravel(), (start, 0)) for m in (c, stored, b)))
        a_row, a_column = (1, 19) if transposed else (41, 1)
        product(
            matrices, start, columns + gap, rows, columns,
            start, a_row, a_column, start, columns + gap, count,
        )  # fmt: skip
        expected = c.copy()
        chain = np.zeros((rows, columns), F32)
        for k in range(count):
            chain = fused(used[:, k : k + 1], b[k, :columns], chain)
        expected[:rows, :columns] += chain
        assert np.array_equal(matrices.c[start:].reshape(c.shape), expected)


# --- elementwise -------------------------------------------------------------------------------


class Arrays(NamedTuple):
    out: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def caller(function: Any, arrays: int) -> Callable[..., None]:
    """Compiled ``call(Arrays, scalars, at, count)`` of an elementwise function."""
    if arrays == 1:

        @njit
        def call(given, scalars, at, count):
            x = borrow(given)
            function(scalars, x.out, at, x.a, at, count)

    elif arrays == 2:

        @njit
        def call(given, scalars, at, count):
            x = borrow(given)
            function(scalars, x.out, at, x.a, at, x.b, at, count)

    else:

        @njit
        def call(given, scalars, at, count):
            x = borrow(given)
            function(scalars, x.out, at, x.a, at, x.b, at, x.c, at, count)

    return call


def apply(function: Any, *inputs: Any, scalars: tuple[Any, ...] = ()) -> np.ndarray:
    """``function`` over float32 arrays of the same length."""
    length = len(inputs[0])
    count = -(-length // LANES) * LANES
    padded = [np.pad(np.asarray(x, F32), (0, count - length)) for x in inputs]
    unused = [np.zeros(0, F32)] * (3 - len(padded))
    out = np.full(count, np.nan, F32)
    call = caller(function, len(inputs))
    call(Arrays(out, *padded, *unused), tuple(F32(x) for x in scalars), 0, count)
    return out[:length]


@pytest.mark.parametrize("vectors", [0, 1, 3, 4, 5, 8, 11])
def test_elementwise_writes_what_it_was_asked_to(vectors: int) -> None:
    """Whole vectors, from any position on, around the four that are unrolled."""
    call, at = caller(vector_math.add, 2), 7
    count = vectors * LANES
    random = np.random.default_rng(vectors)
    arrays = Arrays(*random.standard_normal((4, at + count + 9)).astype(F32))
    expected = arrays.out.copy()
    expected[at : at + count] = (arrays.a + arrays.b)[at : at + count]
    call(arrays, (), at, count)
    assert np.array_equal(arrays.out, expected)


def test_elementwise_in_place() -> None:
    call = caller(vector_math.add, 2)
    a, b = np.random.default_rng(0).standard_normal((2, 5 * LANES)).astype(F32)
    expected = a + b
    call(Arrays(a, a, b, b), (), 0, len(a))
    assert np.array_equal(a, expected)


def test_single_operations_are_ieee() -> None:
    """What is one operation, or one fused pair, has the bits of IEEE arithmetic."""
    a, b, c = np.random.default_rng(1).standard_normal((3, 1000)).astype(F32) * F32(100)
    s, t = F32(0.37), F32(-1.91)
    assert np.array_equal(apply(vector_math.multiply, a, b), a * b)
    assert np.array_equal(apply(vector_math.add_constant, a, scalars=(s,)), a + s)
    assert np.array_equal(apply(vector_math.scale, a, scalars=(s,)), a * s)
    assert np.array_equal(apply(vector_math.fill, a, scalars=(s,)), np.full(1000, s))
    assert np.array_equal(apply(vector_math.larger, a, b), np.maximum(a, b))
    assert np.array_equal(apply(vector_math.add_scaled, a, b, scalars=(s,)), fused(s + 0 * a, a, b))
    squares = apply(vector_math.add_squared_difference, a, b, c)
    assert np.array_equal(squares, fused(b - c, b - c, a))
    normal = apply(vector_math.normalise, a, b, c, scalars=(s, t))
    assert np.array_equal(normal, fused((a - b) * c, s + 0 * a, t + 0 * a))


def test_division_where_there_is_a_total() -> None:
    a, total = np.random.default_rng(2).standard_normal((2, 1000)).astype(F32)
    total = np.abs(total)
    total[::7] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(total > 0, a / total, F32(0))
    assert np.array_equal(apply(vector_math.divide_where_positive, a, total), expected)


def test_inverse_deviation() -> None:
    squares = np.logspace(-30, 30, 10_000).astype(F32)
    found = apply(vector_math.inverse_deviation, squares, scalars=(1 / 37, 1e-5))
    exact = 1 / np.sqrt(squares.astype(np.float64) * F32(1 / 37) + F32(1e-5))
    assert np.abs(found / exact - 1).max() < 2e-7


# --- elementary functions over their whole range -----------------------------------------------


def test_exp() -> None:
    """Relative error below 2e-7 wherever the result is a normal number, 0 below, no overflow."""
    x = np.linspace(-87.3, 88, 1_000_001).astype(F32)
    found = apply(vector_math.exp_difference, x, 0 * x, scalars=(1,))
    exact = np.exp(x.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 2e-7
    beyond = np.array([-88, -89, -1e4, -1e30, -math.inf], F32)
    assert not apply(vector_math.exp_difference, beyond, 0 * x[:5], scalars=(1,)).any()
    assert apply(vector_math.exp_difference, [0.0], [0.0], scalars=(1,)) == 1


def test_exp_of_a_scaled_difference() -> None:
    a, b = np.random.default_rng(3).standard_normal((2, 10_000)).astype(F32) * F32(10)
    found = apply(vector_math.exp_difference, a, b, scalars=(0.25,))
    exact = np.exp((a - b).astype(np.float64) * 0.25)
    assert np.abs(found / exact - 1).max() < 2e-7


def test_gelu() -> None:
    """Error below 2e-7 of max(|x|, 1): that of x · Φ(x) in float32."""
    x = np.concatenate([np.linspace(-20, 20, 1_000_001), [-1e30, 1e30, -0.0, 0.0]]).astype(F32)
    found = apply(vector_math.gelu, x)
    exact = x.astype(np.float64) * ndtr(x.astype(np.float64))
    assert (np.abs(found - exact) / np.maximum(np.abs(x), 1)).max() < 2e-7
    assert found[-4] == 0
    assert found[-3] == F32(1e30)
    assert not found[-2:].any()


@pytest.mark.parametrize("value", [0.0, 1.0, 5.0, 255.0, 3.7, -2.3, 1e-3, 1e4, -1e4])
def test_value_factors(value: float) -> None:
    """2 ** (value · slope - shift): relative error below 3e-7 however large the exponent is."""
    value = float(F32(value))
    exponents = np.random.default_rng(4).uniform(-600, 600, 10_000)
    slope = exponents / value if value else exponents
    high = slope.astype(F32)
    low = (slope - high).astype(F32)
    shift = np.rint(value * high.astype(np.float64)) - np.tile([48, 0, -48, 100], 2500)
    found = apply(vector_math.value_factors, high, low, shift, scalars=(value,))
    exact = np.exp2(value * (high.astype(np.float64) + low) - shift)
    assert np.abs(found / exact - 1).max() < 3e-7


def test_value_factors_too_small_for_float32_are_zero() -> None:
    exponents = np.array([-127.0, -128, -1000, -1e6], F32)
    found = apply(vector_math.value_factors, exponents, 0 * exponents, 0 * exponents, scalars=(1,))
    assert not found.any()
