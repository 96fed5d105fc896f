"""Attention of a cell's queries to its keys, where both have offsets of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import entry_attention, ragged_attention, ragged_self_attention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..examples import examples
from .self_attending import HALF, HEAD_DIM, HEADS, TOLERANCE, errors, gradient_of

QUERIES, KEYS = [5, 0, 19, 1, 3], [2, 7, 31, 0, 1]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    query_offsets: Tensor
    key_offsets: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*self[:3]]

    def having(self, leaves: Sequence[Tensor]) -> Inputs:
        return Inputs._make([*leaves, *self[3:]])


def draw(
    queries: Sequence[int] = QUERIES,
    keys: Sequence[int] = KEYS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Random queries, keys and values, all leaves, and offsets."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(sum(lengths), heads, head_dim, generator=generator).to(device, dtype)
        for lengths in (queries, keys, keys)
    ]
    offsets = [torch.tensor([0, *x]).cumsum(0).to(device) for x in (queries, keys)]
    return Inputs._make([*(leaf.requires_grad_() for leaf in leaves), *offsets])


def with_gradients(inputs: Inputs, **options: Any) -> list[Tensor]:
    """Output and gradients of query, key and value, for one random gradient of the output."""
    output = ragged_attention(*inputs, **options)
    gradients = torch.autograd.grad(output, inputs.leaves, gradient_of(output))
    return [output.detach(), *gradients]


def exact(inputs: Inputs, **options: Any) -> list[Tensor]:
    """The same from the reference in float64, on the CPU."""
    there = Inputs._make(x.detach().cpu() for x in inputs)
    doubled = there.having([x.double().requires_grad_() for x in there.leaves])
    return with_gradients(doubled, backend="reference", **options)


def assert_right(found: list[Tensor], inputs: Inputs, **options: Any) -> None:
    """float32 to 1e-5; half precision to twice the error of PyTorch in that precision."""
    limits = [TOLERANCE, TOLERANCE]
    expected = exact(inputs, **options)
    if inputs.query.dtype.itemsize == 2:
        rough = errors(with_gradients(inputs, backend="reference", **options), expected)
        limits = [2 * limit for limit in rough]
    assert all(e <= limit for e, limit in zip(errors(found, expected), limits, strict=True))


# --- right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.31])
def test_the_reference_is_the_definition(scale: float | None) -> None:
    """Against loops in NumPy; a query without keys attends to nothing."""
    inputs = draw(dtype=torch.float64)
    found = ragged_attention(*inputs, scale=scale, backend="reference")
    query, key, value, *offsets = (x.detach().numpy() for x in inputs)
    expected = np.zeros_like(query)
    for (start, stop), (first, last) in zip(*map(itertools.pairwise, offsets), strict=True):
        for i in range(start, stop if first < last else start):
            for h in range(HEADS):
                scores = key[first:last, h] @ query[i, h] * (scale or 1 / math.sqrt(HEAD_DIM))
                weights = np.exp(scores) / np.exp(scores).sum()
                expected[i, h] = weights @ value[first:last, h]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_reference() -> None:
    inputs = draw([3, 0, 2, 1], [2, 5, 0, 3], 2, 3, dtype=torch.float64)

    def attend(*leaves: Tensor) -> Tensor:
        return ragged_attention(*inputs.having(leaves), backend="reference")

    torch.autograd.gradcheck(attend, inputs.leaves)


@examples(20)
@given(
    lengths=st.lists(
        st.tuples(*[st.sampled_from([0, 1, 2, 3, 7, 31, 67, 211])] * 2), min_size=1, max_size=4
    ),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([1, 5, 13, 16, 67]),
)
def test_against_float64(lengths: list[tuple[int, int]], heads: int, head_dim: int) -> None:
    queries, keys = zip(*lengths, strict=True)
    inputs = draw(queries, keys, heads, head_dim)
    assert_right(with_gradients(inputs), inputs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = draw([67, 0, 19, 211], [31, 3, 0, 97], dtype=dtype)
    assert_right(with_gradients(inputs), inputs)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("queries", "keys"), [([], []), ([0, 0], [3, 0]), ([3, 0], [0, 0])], ids=str
)
def test_nothing_to_attend(queries: list[int], keys: list[int], backend: str | None) -> None:
    inputs = draw(queries, keys)
    found = with_gradients(inputs, backend=backend)
    assert [x.shape for x in found] == [x.shape for x in (inputs.query, *inputs.leaves)]
    assert not any(x.any() for x in found)


def test_of_the_same_entries_it_is_self_attention() -> None:
    inputs = draw(QUERIES, QUERIES)
    expected = ragged_self_attention(*inputs[:4])
    assert torch.equal(ragged_attention(*inputs), expected)


def test_a_cell_depends_on_itself_alone(threads: int) -> None:
    """Output and gradients of a cell alone, and behind others that move it in memory."""
    inputs = draw([1, 31, 0, 3, 211], [67, 3, 7, 0, 64])
    together = with_gradients(inputs)
    gradient = gradient_of(together[0])
    spans = (itertools.pairwise(x.tolist()) for x in inputs[3:])
    for queries, keys in zip(*(itertools.starmap(slice, span) for span in spans), strict=True):
        rows = queries, keys, keys
        own = [
            x[part].detach().clone().requires_grad_()
            for x, part in zip(inputs.leaves, rows, strict=True)
        ]
        offsets = (torch.tensor([0, len(x)]) for x in own[:2])
        output = ragged_attention(*own, *offsets)
        alone = [output, *torch.autograd.grad(output, own, gradient[queries])]
        for whole, part, one in zip(together, (queries, *rows), alone, strict=True):
            assert torch.equal(whole[part], one)


# --- a good citizen of PyTorch -----------------------------------------------------------------


def test_opcheck() -> None:
    inputs = draw()
    forward = torch.ops.cellpatch.entry_attention
    given = (*inputs, None, None, 0.3)
    assert set(torch.library.opcheck(forward.default, given).values()) == {"SUCCESS"}
    with torch.no_grad():
        results = forward(*given)
    backward = torch.ops.cellpatch.entry_attention_backward.default
    given = (torch.ones_like(results[0]), *(x.detach() for x in inputs), *given[5:], *results)
    assert set(torch.library.opcheck(backward, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_what_is_traced_for_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(entry_attention, "FLASH_ATTN_INSTALLED", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        leaves = [torch.empty(n, HEADS, 7, dtype=dtype, device="cuda") for n in (28, 41, 41)]
        offsets = [torch.empty(6, dtype=torch.int64, device="cuda") for _ in range(2)]
        output = ragged_attention(*leaves, *offsets, max_query_length=19, max_key_length=31)
    assert (output.shape, output.dtype) == (leaves[0].shape, dtype)
    assert output.device.type == "cuda"


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"key": torch.zeros(41, 7, 3)}, r"key has shape \[41, 7, 3\]", id="swapped"),
        pytest.param({"value": torch.zeros(40, 3, 7)}, "as many as values", id="fewer_values"),
        pytest.param({"query_offsets": torch.tensor([0, 28])}, "of 1 cells, but", id="cells"),
        pytest.param({"key_offsets": torch.tensor([0.0])}, "int32 or int64", id="float_offsets"),
        pytest.param({"key_offsets": torch.arange(6)}, "number of entries, 41", id="too_short"),
        pytest.param({"query_offsets": torch.arange(6)}, "of entries, 28", id="queries_too_short"),
        pytest.param({"max_query_length": 18}, "a cell has 19 entries", id="max_query_length"),
        pytest.param({"max_key_length": 30}, "a cell has 31 entries", id="max_key_length"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_refusals(change: dict[str, Any], message: str, backend: str | None) -> None:
    given: dict[str, Any] = draw()._asdict() | change
    with pytest.raises(ValueError, match=message):
        ragged_attention(**given, backend=backend)


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["memory_efficient", "varlen", "flash_attn"])
@pytest.mark.parametrize("head_dim", [13, 16])
def test_kernels_of_cuda_against_float64(backend: str, head_dim: int) -> None:
    """Cells without queries and cells without keys among them."""
    if backend == "flash_attn" and not entry_attention.FLASH_ATTN_INSTALLED:
        pytest.skip("flash-attn is not installed")
    for dtype in HALF if backend != "memory_efficient" else [torch.float32, *HALF]:
        inputs = draw([5, 0, 211, 3], [0, 7, 64, 797], 2, head_dim, dtype=dtype, device="cuda")
        assert_right(with_gradients(inputs, backend=backend), inputs)
