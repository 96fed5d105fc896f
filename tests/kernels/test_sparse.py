"""Sparse times dense: right, differentiable, deterministic, and refused where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels.sparse import SparsePattern, pattern_of, sparse_product
from hypothesis import given
from hypothesis import strategies as st

from ..examples import examples


def example(
    rows: int, columns: int, longest: int, width: int, seed: int = 0
) -> tuple[SparsePattern, torch.Tensor, torch.Tensor]:
    """A pattern with rows of 0 to ``longest`` entries, its entries, and a dense matrix."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest + 1, rows)
    lengths[generator.integers(rows)] = longest
    offsets = torch.from_numpy(np.append(0, lengths.cumsum()))
    ids = torch.from_numpy(generator.integers(0, columns, int(offsets[-1])))
    entries = torch.from_numpy(generator.standard_normal(len(ids)).astype(np.float32))
    dense = torch.from_numpy(generator.standard_normal((columns, width)).astype(np.float32))
    return pattern_of(offsets, ids, columns), entries, dense


def with_gradients(
    pattern: SparsePattern,
    entries: torch.Tensor,
    dense: torch.Tensor,
    backend: str,
    change: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> list[torch.Tensor]:
    """The product, and gradients of a fixed function of it."""
    entries, dense = entries.clone().requires_grad_(), dense.clone().requires_grad_()
    product = sparse_product(pattern, entries, dense, backend=backend)
    weights = change(torch.linspace(-1, 1, product.numel(), device=product.device))
    loss = (product * weights.view(product.shape)).sum()
    return [product.detach(), *torch.autograd.grad(loss, (entries, dense))]


def require_equal(
    backend: str, pattern: SparsePattern, entries: torch.Tensor, dense: torch.Tensor
) -> None:
    """To 1e-6 of the sum of the sizes of all terms."""
    computed = with_gradients(pattern, entries, dense, backend)
    entries, dense = entries.double(), dense.double()
    exact = with_gradients(pattern, entries, dense, "reference")
    sizes = with_gradients(pattern, entries.abs(), dense.abs(), "reference", torch.abs)
    for ours, right, size in zip(computed, exact, sizes, strict=True):
        assert ((ours.double() - right).abs() <= 1e-6 * size).all()


# a panel is 64 columns, a piece 512 entries, a task 128 rows; Triton's piece is larger
@pytest.mark.parametrize("width", [1, 30, 64, 67, 131])
@pytest.mark.parametrize("longest", [3, 513, 1031])
def test_products_and_gradients_are_right(width: int, longest: int) -> None:
    require_equal("numba", *example(131, 37, longest, width))


@pytest.mark.parametrize(("rows", "longest", "width"), [(5, 3, 67), (3, 37, 64), (2, 1031, 3)])
def test_products_by_the_triton_backend_are_right(
    triton_backend: None,
    device_of: Callable[[str], torch.device],
    rows: int,
    longest: int,
    width: int,
) -> None:
    device = device_of("triton")
    pattern, entries, dense = example(rows, 11, longest, width)
    require_equal("triton", pattern.to(device), entries.to(device), dense.to(device))


@examples(50)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), longest=st.integers(0, 20),
    width=st.integers(1, 70), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_of_any_shape_are_right(
    rows: int, columns: int, longest: int, width: int, seed: int
) -> None:
    require_equal("numba", *example(rows, columns, longest, width, seed))


def test_a_sum_over_a_million_entries_keeps_five_digits() -> None:
    """One chain of float32 sums would be off by 1 %."""
    entries = torch.full((1_000_000,), 0.1)
    pattern = pattern_of(torch.tensor([0, len(entries)]), torch.zeros(len(entries)).long(), 1)
    product = sparse_product(pattern, entries, torch.ones(1, 1), backend="numba")
    assert float(product) == pytest.approx(100_000, rel=2e-5)


def test_bits_do_not_depend_on_threads_or_on_other_rows() -> None:
    pattern, entries, dense = example(307, 101, 29, 83)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(pattern, entries, dense, "numba"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
    first, last = 101, 211
    some = slice(int(pattern.offsets[first]), int(pattern.offsets[last]))
    part = pattern_of(
        pattern.offsets[first : last + 1] - some.start, pattern.columns[some], len(dense)
    )
    alone = sparse_product(part, entries[some], dense, backend="numba")
    assert torch.equal(alone, results[0][0][first:last])


def test_a_transposed_pattern_is_that_of_the_transposed_matrix() -> None:
    pattern, entries, _ = example(29, 37, 7, 5)
    turned = pattern.transposed()
    assert turned.shape == (37, 29)
    by_hand = torch.zeros(29, 37, dtype=torch.float64)
    row = torch.arange(29).repeat_interleave(pattern.offsets.diff())
    by_hand.index_put_((row, pattern.columns), entries.double(), accumulate=True)
    other = torch.randn(29, 3)
    product = sparse_product(turned, entries[pattern.order], other)
    torch.testing.assert_close(product.double(), by_hand.T @ other.double(), rtol=0, atol=1e-5)
    assert all(map(torch.equal, turned.transposed()[:2], pattern[:2]))


def test_rows_without_entries_are_zero_and_nothing_at_all_is_no_error() -> None:
    pattern = pattern_of(torch.zeros(4).long(), torch.zeros(0).long(), 5)
    assert torch.equal(sparse_product(pattern, torch.zeros(0), torch.ones(5, 7)), torch.zeros(3, 7))
    none = pattern_of(torch.zeros(1).long(), torch.zeros(0).long(), 0)
    assert sparse_product(none, torch.zeros(0), torch.ones(0, 7)).shape == (0, 7)


def test_the_operators_are_what_pytorch_expects() -> None:
    pattern, entries, dense = example(7, 5, 3, 17)
    entries.requires_grad_()
    dense.requires_grad_()
    torch.library.opcheck(
        torch.ops.cellpatch.sparse_product.default, (*pattern, entries, dense, "numba")
    )
    computed = torch.compile(
        lambda e, d: sparse_product(pattern, e, d), fullgraph=True, backend="aot_eager"
    )(entries, dense)
    assert torch.equal(computed, sparse_product(pattern, entries, dense))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3])}, r"offsets must run from 0 to .* entries, 2"),
        ({"offsets": torch.tensor([0.0, 2.0])}, "offsets must be one-dimensional, int32 or int64"),
        ({"columns": torch.tensor([0, 3])}, "columns run from 0 to 3, but .* columns 0 to 2"),
        ({"columns": torch.tensor([-1, 0])}, "columns run from -1 to 0"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "offsets": torch.tensor([0, 2]), "columns": torch.tensor([0, 2]), "width": 3
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pattern_of(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": torch.zeros(3)}, "the pattern has 2 entries, found entries of shape"),
        ({"dense": torch.zeros(4, 2)}, r"dense must be \[3, d\], as the sparse matrix"),
        ({"dense": torch.zeros(3, 2).double()}, "entries are torch.float32 and dense is"),
        ({"backend": "fortran"}, "unknown backend"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    pattern = pattern_of(torch.tensor([0, 2]), torch.tensor([0, 2]), 3)
    arguments: dict[str, Any] = {"entries": torch.zeros(2), "dense": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=message):
        sparse_product(pattern, **(arguments | change))
