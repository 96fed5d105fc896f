"""Elementary functions over vectors, and the elementwise loops of the encoder.

Built from fused multiply-adds and integer shifts only, so they give the same bits on every
machine, unlike a system's libm.
"""

from __future__ import annotations

import math

from .simd import (
    Vector,
    elementwise,
    fma,
    maximum,
    power_of_two,
    square_root,
    where_positive,
)

_ROUND = 1.5 * 2.0**23  # adding and subtracting it rounds to an integer
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6


def round_to_integer(x: Vector) -> Vector:
    """x rounded to the nearest integer, |x| < 2^22."""
    return (x + _ROUND) - _ROUND


def exp2_fraction(x: Vector) -> Vector:
    """2 ** x for |x| <= 0.5: Taylor series to degree 7; the next term is below 2e-9."""
    y = x.like(1.5252733804059841e-5)
    for coefficient in (
        1.5403530393381608e-4,
        1.3333558146428443e-3,
        9.6181291076284772e-3,
        5.5504108664821580e-2,
        2.4022650695910071e-1,
        6.9314718055994531e-1,
        1.0,
    ):
        y = fma(y, x, coefficient)
    return y


def exp(x: Vector) -> Vector:
    """e ** x for x <= 88; 0 below -88; NaN of NaN."""
    x = maximum(x.like(-88.0), x)  # in this order NaN stays what it is
    whole = round_to_integer(x * math.log2(math.e))
    rest = fma(whole, -_LN2_LOW, fma(whole, -_LN2_HIGH, x))
    return exp2_fraction(rest * math.log2(math.e)) * power_of_two(whole)


@elementwise(arrays=2)
def multiply(a: Vector, b: Vector) -> Vector:
    return a * b


@elementwise(arrays=2)
def add(a: Vector, b: Vector) -> Vector:
    return a + b


@elementwise(arrays=1, scalars=1)
def add_constant(constant: Vector, a: Vector) -> Vector:
    return a + constant


@elementwise(arrays=2, scalars=1)
def add_scaled(scale: Vector, a: Vector, b: Vector) -> Vector:
    return fma(scale, a, b)


@elementwise(arrays=1, scalars=1)
def scale(factor: Vector, a: Vector) -> Vector:
    return a * factor


@elementwise(arrays=2)
def divide_where_positive(a: Vector, total: Vector) -> Vector:
    """a / total; 0 where total is 0."""
    return where_positive(total, a / total)


@elementwise(arrays=2)
def poison(a: Vector, b: Vector) -> Vector:
    """a, or NaN where b is not finite."""
    return a + (b - b)


@elementwise(arrays=3, scalars=1, unroll=1)
def value_factors(value: Vector, slope: Vector, slope_rest: Vector, shift: Vector) -> Vector:
    """2 ** (value · slope - shift), where shift is an integer.

    The slope has a high and a low part and the product's rounding error is kept, so that the
    result is right to a few units in the last place however large the exponent is.
    """
    exponent = value * slope
    rest = fma(value, slope_rest, fma(value, slope, -exponent))
    whole = round_to_integer(exponent)
    power = power_of_two(maximum(whole - shift, -127.0))  # at most SCALE, by choice of shift
    return exp2_fraction((exponent - whole) + rest) * power


@elementwise(arrays=1, unroll=1)
def powers_of_two(x: Vector) -> Vector:
    """2 ** x; 0 where x is below -127, and 2^127 at most."""
    whole = round_to_integer(x)
    lowest, highest = x.like(-127.0), x.like(127.0)
    # in this order NaN, which the fraction is too, stays what it is
    return exp2_fraction(x - whole) * power_of_two(-maximum(-highest, -maximum(lowest, whole)))


@elementwise(arrays=1, scalars=1)
def fill(value: Vector, _: Vector) -> Vector:
    """A constant everywhere."""
    return value


@elementwise(arrays=2)
def larger(a: Vector, b: Vector) -> Vector:
    return maximum(a, b)


@elementwise(arrays=2, scalars=1, unroll=1)
def exp_difference(factor: Vector, a: Vector, b: Vector) -> Vector:
    """e ** ((a - b) · factor)."""
    return exp((a - b) * factor)


@elementwise(arrays=1, unroll=1)
def exponentials(a: Vector) -> Vector:
    return exp(a)


@elementwise(arrays=3)
def multiply_difference(factor: Vector, a: Vector, b: Vector) -> Vector:
    """factor · (a - b)."""
    return factor * (a - b)


@elementwise(arrays=3)
def multiply_subtract(a: Vector, b: Vector, c: Vector) -> Vector:
    """a · b - c."""
    return fma(a, b, -c)


@elementwise(arrays=1, unroll=1)
def gelu(x: Vector) -> Vector:
    """x · Φ(x), the exact GELU; erf after Abramowitz and Stegun 7.1.26 (error 1.5e-7)."""
    z = abs(x) * math.sqrt(0.5)
    t = z.like(1.0) / fma(z, 0.3275911, 1.0)
    y = t.like(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = fma(y, t, coefficient)
    tail = y * t * exp(-(z * z))  # 1 - erf(z)
    half = x * 0.5
    return fma(abs(half), z.like(1.0) - tail, half)


@elementwise(arrays=3)
def add_squared_difference(sums: Vector, a: Vector, mean: Vector) -> Vector:
    difference = a - mean
    return fma(difference, difference, sums)


@elementwise(arrays=1, scalars=2, unroll=1)
def inverse_deviation(count_inverse: Vector, epsilon: Vector, squares: Vector) -> Vector:
    """1 / sqrt(squares / count + epsilon)."""
    return squares.like(1.0) / square_root(fma(squares, count_inverse, epsilon))


@elementwise(arrays=3, scalars=2)
def normalise(weight: Vector, bias: Vector, a: Vector, mean: Vector, inverse: Vector) -> Vector:
    return fma((a - mean) * inverse, weight, bias)
