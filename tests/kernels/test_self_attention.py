"""Self-attention among a cell's entries: right, the same in every batch, and memory-bounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels.entry_attention import ragged_self_attention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..examples import examples
from .self_attending import (
    HALF,
    HEAD_DIM,
    HEADS,
    TOLERANCE,
    assert_right,
    draw,
    errors,
    exact,
    gradient_of,
    part,
    with_gradients,
)

# --- right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.31])
def test_the_reference_is_the_definition(scale: float | None) -> None:
    """Against loops in NumPy."""
    inputs = draw(dtype=torch.float64)
    found = ragged_self_attention(*inputs, scale=scale, backend="reference")
    query, key, value, offsets = (x.detach().numpy() for x in inputs)
    expected = np.zeros_like(query)
    for start, stop in itertools.pairwise(offsets):
        for i in range(start, stop):
            for h in range(HEADS):
                scores = key[start:stop, h] @ query[i, h] * (scale or 1 / math.sqrt(HEAD_DIM))
                weights = np.exp(scores) / np.exp(scores).sum()
                expected[i, h] = weights @ value[start:stop, h]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_reference() -> None:
    inputs = draw([3, 0, 4], 2, 3, dtype=torch.float64)

    def attend(*leaves: Tensor) -> Tensor:
        return ragged_self_attention(*inputs.having(leaves), backend="reference")

    torch.autograd.gradcheck(attend, inputs.leaves)
    torch.autograd.gradgradcheck(attend, inputs.leaves, fast_mode=True)


@examples(40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 31, 67, 211, 797]), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 3, 5]),
    head_dim=st.sampled_from([1, 5, 8, 13, 17, 64, 127]),
    dtype=st.sampled_from([torch.float32, *HALF]),
    scale=st.sampled_from([None, 0.31]),
    factor=st.sampled_from([1.0, 3.0]),
)
def test_against_float64(
    lengths: list[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float | None,
    factor: float,
) -> None:
    inputs = draw(lengths, heads, head_dim, dtype=dtype, factor=factor)
    assert_right(with_gradients(inputs, scale=scale), inputs, scale=scale)


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_scores_of_any_size(shift: float) -> None:
    """Scores near ±120, whose exponentials float32 cannot hold.

    The scores themselves it holds exactly: sums of multiples of 1/64.
    """
    inputs = draw([5, 211])
    with torch.no_grad():
        for leaf in inputs.leaves:
            leaf.copy_((8 * leaf).round() / 8)
        inputs.query[..., 0], inputs.key[..., 0] = 1.0, shift
    found, expected = with_gradients(inputs, scale=1.0), exact(inputs, scale=1.0)
    # that gradient is ±120 times a sum that is 0
    found[1], expected[1] = (x[1][..., 1:] for x in (found, expected))
    assert max(errors(found, expected)) <= TOLERANCE


def test_a_long_cell() -> None:
    inputs = draw([2503], 1, 8)
    assert_right(with_gradients(inputs), inputs)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_nothing(lengths: list[int], backend: str | None) -> None:
    found = with_gradients(draw(lengths), backend=backend)
    assert [x.shape for x in found] == [(0, HEADS, HEAD_DIM)] * 4


def test_a_single_entry_attends_to_itself() -> None:
    query, key, value, offsets = draw([1, 1])
    assert torch.equal(ragged_self_attention(query, key, value, offsets), value)


def test_slices_of_one_projection() -> None:
    """Queries, keys and values that are not contiguous, and a gradient that is one number."""
    inputs = draw()
    together = torch.randn(len(inputs.query), 3, HEADS, HEAD_DIM, requires_grad=True)
    apart = [x.detach().clone().requires_grad_() for x in together.unbind(1)]
    for leaves in (together.unbind(1), apart):
        ragged_self_attention(*inputs.having(leaves)).sum().backward()
    gradients = [torch.zeros(()) if x.grad is None else x.grad for x in (together, *apart)]
    assert torch.equal(gradients[0], torch.stack(gradients[1:], 1))


def test_int32_offsets() -> None:
    query, key, value, offsets = draw()
    expected = ragged_self_attention(query, key, value, offsets)
    assert torch.equal(ragged_self_attention(query, key, value, offsets.int()), expected)


def test_inputs_are_left_alone() -> None:
    inputs = draw()
    before = [x.detach().clone() for x in inputs]
    with_gradients(inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# --- the same bits, whatever else is computed --------------------------------------------------


def in_a_batch_and_alone(dtype: torch.dtype, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and gradients of each cell behind others that move it in memory, and alone."""
    inputs = draw([1, 31, 0, 3, 31, 797, 7, 211], heads, HEAD_DIM, dtype=dtype)
    together = with_gradients(inputs)
    gradient = gradient_of(together[0])
    for start, stop in itertools.pairwise(inputs.offsets.tolist()):
        own = part(inputs, start, stop)
        output = ragged_self_attention(*own)
        alone = [output, *torch.autograd.grad(output, own.leaves, gradient[start:stop])]
        yield from ((x[start:stop], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_cell_depends_on_itself_alone(dtype: torch.dtype, heads: int, threads: int) -> None:
    assert all(torch.equal(x, y) for x, y in in_a_batch_and_alone(dtype, heads))


@pytest.mark.parametrize("heads", [1, 3])
def test_in_float64_to_rounding(heads: int, threads: int) -> None:
    """The reference computes float64, and PyTorch's products may round by place in memory.

    Sums of 797 terms of either sign, with scores up to some ten: 797 · 10 · 2^-53 is 9e-13.
    """
    for x, y in in_a_batch_and_alone(torch.float64, heads):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_twice_the_same(two_threads: None) -> None:
    first, second = (with_gradients(draw([797, 31, 211])) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_grows_with_the_entries() -> None:
    """Nothing is allocated that has a byte for every pair of entries."""
    entries = 2003
    inputs = draw([entries], 1, 8)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        with_gradients(inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert entries * 8 * 4 <= largest < entries**2
