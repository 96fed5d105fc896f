"""What ragged attention on a CPU is made of: products in float64, powers, and dropped weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import reference
from cellpatch_fast.kernels.cpu import vector_math
from cellpatch_fast.kernels.cpu.dropout import (
    begin_words,
    drop_weights,
    make_dropout,
    make_words,
)
from cellpatch_fast.kernels.cpu.simd import EXACT_ROWS, LANES, borrow, multiply_exactly
from cellpatch_fast.kernels.ragged import RaggedAttention
from numba import njit

F32 = np.float32


class Product(NamedTuple):
    c: np.ndarray  # float32
    a: np.ndarray  # float64
    b: np.ndarray  # float64


@njit
def multiply(product, c_row, rows, columns, a_row, b_row, count):
    p = borrow(product)
    multiply_exactly(p.c, 1, c_row, rows, columns, p.a, 2, a_row, p.b, 3, b_row, count)


@pytest.mark.parametrize("count", [0, 1, 19])
def test_exact_products_are_those_of_float64_rounded_once(count: int) -> None:
    """Of large terms that cancel, and for all numbers of rows; what was there is replaced."""
    random = np.random.default_rng(count)
    columns = 3 * LANES
    for rows in range(1, 2 * EXACT_ROWS + 2):
        filled = -(-rows // EXACT_ROWS) * EXACT_ROWS
        a = 1000 * random.standard_normal((filled, count + 1))
        b = 1000 * random.standard_normal((count, columns + 5))
        found = Product(
            np.full(1 + filled * (columns + 7), np.nan, F32),
            np.concatenate([np.zeros(2), a.ravel()]),
            np.concatenate([np.zeros(3), b.ravel()]),
        )
        multiply(found, columns + 7, rows, columns, count + 1, columns + 5, count)
        expected = a[:rows, :count] @ b[:, :columns]
        c = found.c[1:].reshape(filled, -1)[:rows, :columns]
        # the largest difference of two sums in float64 is far below a unit of float32
        np.testing.assert_allclose(c, expected, rtol=2.0**-24, atol=1e-8)


class Powers(NamedTuple):
    x: np.ndarray
    two: np.ndarray
    e: np.ndarray


@njit
def raise_powers(powers):
    p = borrow(powers)
    vector_math.powers_of_two((), p.two, 0, p.x, 0, len(powers.x))
    vector_math.exponentials((), p.e, 0, p.x, 0, len(powers.x))


def test_powers_are_right_and_what_is_not_a_number_remains() -> None:
    x = np.linspace(-80, 80, 10 * LANES).astype(F32)
    x[:5] = math.nan, -math.inf, -300, 300, 0
    found = Powers(x, np.empty_like(x), np.empty_like(x))
    raise_powers(found)
    assert np.isnan(found.two[0])
    assert np.isnan(found.e[0])
    assert found.two[2] == found.e[2] == 0
    assert found.e[1] == 0
    assert found.two[3] == F32(2.0**127)
    assert found.two[4] == found.e[4] == 1
    np.testing.assert_allclose(found.two[5:], np.exp2(x[5:].astype(np.float64)), rtol=2e-7)
    np.testing.assert_allclose(found.e[5:], np.exp(x[5:].astype(np.float64)), rtol=2e-6)


class Weights(NamedTuple):
    given: np.ndarray  # float32 [n, row]
    left: np.ndarray  # float32 [n, row]
    words: np.ndarray


@njit
def drop(weights, row, entries, dropout, cell, h, first_query, queries, count):
    w = borrow(weights)
    begin_words(w.words, 3, dropout, cell, h, first_query, queries, count)
    for k in range(len(entries)):
        at = k * row
        drop_weights(w.left, at, w.given, at, w.words, 3, entries[k], count, dropout)


@pytest.mark.parametrize("count", [16, 48, 80])
@pytest.mark.parametrize(("seed", "dropout"), [(0, 0.25), (-1, 0.9), (2**62 + 12345, 0.5)])
def test_kept_weights_are_those_of_the_definition(seed: int, dropout: float, count: int) -> None:
    """For any entries in any order, beginning with any fourth query."""
    queries, heads, h, first_query = 91, 3, 1, 4
    cell, entries = 70_001, np.array([2**20 + 3, 0, 7, 8, 1])
    nothing = torch.empty(0)
    problem = RaggedAttention(
        torch.empty(1, queries, heads, 8), nothing, nothing, nothing, None, None, None, None, None,
        torch.tensor([seed]), 1.0, dropout,
    )  # fmt: skip
    every = reference.kept(problem, torch.full((5,), cell), torch.from_numpy(entries))  # [n, h, q]
    kept = every[:, h, first_query : first_query + count].numpy()
    row, nothing_else = count + 5, np.full((5, 5), 7, F32)
    given = np.random.default_rng(0).random((5, row)).astype(F32)
    left = np.full((5, row), 7, F32)
    weights = Weights(given.ravel(), left.ravel(), np.zeros(3 + len(make_words(count)), np.int64))
    drop(weights, row, entries, make_dropout(problem), cell, h, first_query, queries, count)
    factor = F32(1 / (1 - dropout))
    assert np.array_equal(left[:, :count], np.where(kept, given[:, :count] * factor, 0))
    assert np.array_equal(left[:, count:], nothing_else)
