"""Ragged attention of the Numba backend: right to 1e-5.

`test_ragged_attention` tests the public functions on every backend, `test_cpu_ragged_bits` that
nothing depends on the batch or on the number of threads. Here is what is particular to this one:
its two paths and the border between them, long cells, often repeated rows, large scores.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import reference
from cellpatch_fast.kernels.cpu import ragged, ragged_tables
from cellpatch_fast.kernels.cpu import ragged_tables_backward as tables_backward
from cellpatch_fast.kernels.ragged import Gradients, RaggedAttention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..examples import examples
from .conditioning import rounding

TOLERANCE = 1e-5
LENGTHS = (3, 0, 41, 1, 1103)  # none, one, and more than a chunk
ROWS = 101
FLOATING = Gradients._fields


def make(
    lengths: tuple[int, ...] = LENGTHS,
    *,
    queries: int = 17,
    heads: int = 3,
    head_dim: int = 13,
    rows: int | None = ROWS,
    shared: bool = True,
    amounts: str = "none",
    bias: bool = False,
    dropout: float = 0.0,
    largest_score: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RaggedAttention:
    """A random problem. Amounts are of a kind: none, uint8, float32 (affine parts) or bins."""
    generator = torch.Generator().manual_seed(seed)
    entries, cells, bins = sum(lengths), len(lengths), 7

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    part = (bins, heads, head_dim) if amounts == "bins" else (heads, head_dim)
    levels = torch.randint(0, bins, (entries,), generator=generator).to(torch.uint8)
    problem = RaggedAttention(
        query=normal(1 if shared else cells, queries, heads, head_dim),
        key=normal(rows or entries, heads, head_dim),
        value=normal(rows or entries, heads, head_dim),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        ids=None if rows is None else torch.randint(0, rows, (entries,), generator=generator),
        amounts=normal(entries).abs() if amounts == "float" else levels,
        key_part=0.3 * normal(*part),
        value_part=normal(*part),
        bias=normal(entries, heads) if bias else None,
        seed=torch.tensor([-1234567890123456789]) if dropout else None,
        scale=head_dim**-0.5,
        dropout=dropout,
    )
    if amounts == "none":
        problem = problem._replace(amounts=None, key_part=None, value_part=None)
    if largest_score is not None:
        largest = (problem.query[0].abs().amax(0) * problem.key.abs().amax(0)).sum(-1).max()
        highest = torch.einsum("cqhd,rhd->cqhr", problem.query, problem.key).abs().max()
        assert largest >= highest
        problem = problem._replace(scale=float(largest_score / highest))
    floating = {name: getattr(problem, name) for name in FLOATING if name != "bias"}
    converted: dict[str, Any] = {
        name: None if tensor is None else tensor.to(dtype) for name, tensor in floating.items()
    }
    return problem._replace(**converted)


class Found:
    """Results of both directions, for random gradients of the output and the log-sum-exp."""

    def __init__(self, problem: RaggedAttention) -> None:
        self.output, self.log_sum_exp = ragged.forward(problem)
        self.gradient = random_like(self.output)
        self.log_sum_exp_gradient = random_like(self.log_sum_exp)
        delta = (self.gradient.float() * self.output.float()).sum(-1).transpose(1, 2)
        delta = (delta - self.log_sum_exp_gradient).contiguous()
        self.gradients = ragged.backward(
            problem, self.gradient, delta, self.log_sum_exp, deterministic=False
        )

    def tensors(self) -> list[Tensor]:
        gradients = [tensor for tensor in self.gradients if tensor is not None]
        return [self.output, self.log_sum_exp, *gradients]


def random_like(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(tensor.numel())
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def by_definition(problem: RaggedAttention, found: Found, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the oracle, in ``dtype``, by autograd."""
    leaves = {
        name: getattr(problem, name).to(dtype).requires_grad_()
        for name in FLOATING
        if getattr(problem, name) is not None
    }
    amounts = problem.amounts
    if amounts is not None and amounts.is_floating_point():
        amounts = amounts.to(dtype)
    output, log_sum_exp = reference.ragged_attention(problem._replace(amounts=amounts, **leaves))
    finite = log_sum_exp.isfinite()
    total = (output * found.gradient.to(dtype)).sum()
    total = total + (log_sum_exp[finite] * found.log_sum_exp_gradient.to(dtype)[finite]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {
        "output": output.detach(),
        "log_sum_exp": log_sum_exp.detach(),
        **dict(zip(leaves, gradients, strict=True)),
    }


def in_float64(problem: RaggedAttention) -> RaggedAttention:
    """The same problem, its floating tensors in float64."""
    doubled: dict[str, Any] = {
        name: tensor.double()
        for name, tensor in problem._asdict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    return problem._replace(**doubled)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found[~finite].double(), expected[~finite].double())
    difference = (found.double() - expected.double())[finite].norm()
    return float(difference / expected.double()[finite].norm().clamp_min(1e-30))


def check(problem: RaggedAttention) -> Found:
    """Assert that everything is right to 1e-5; a cell's output by itself, too.

    Gradients in which large terms cancel are right to the rounding of those.
    """
    found = Found(problem)
    expected = by_definition(problem, found, torch.float64)
    for cell in range(problem.cells):
        assert error(found.output[cell], expected["output"][cell]) <= TOLERANCE
    assert error(found.log_sum_exp, expected["log_sum_exp"]) <= TOLERANCE
    losses = found.gradient.double(), found.log_sum_exp_gradient.double()
    least = rounding(in_float64(problem), *losses)
    for name, gradient in zip(FLOATING, found.gradients, strict=True):
        assert (gradient is None) == (name not in expected)
        if gradient is not None:
            assert gradient.dtype == getattr(problem, name).dtype
            right = expected[name]
            limit = max(TOLERANCE, least[name] / float(right.norm().clamp_min(1e-30)))
            assert error(gradient, right) <= limit, name
    return found


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general path computes everything."""
    monkeypatch.setattr(ragged_tables, "suits", lambda problem: False)


# --- right -------------------------------------------------------------------------------------


KINDS = ["none", "uint8", "float", "bins"]


@pytest.mark.parametrize("amounts", KINDS)
def test_shared_queries_over_tables_are_right(amounts: str) -> None:
    problem = make(amounts=amounts)
    assert ragged_tables.suits(problem)
    check(problem)


@pytest.mark.parametrize("amounts", KINDS)
def test_the_general_path_is_right_over_tables(general: None, amounts: str) -> None:
    check(make(amounts=amounts))


@pytest.mark.parametrize("amounts", ["none", "float"])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["per_entry", "tables"])
def test_queries_of_each_cell_are_right(rows: int | None, amounts: str) -> None:
    check(make(rows=rows, amounts=amounts, shared=False))


@pytest.mark.parametrize("shared", [True, False])
def test_keys_of_each_entry_are_right(shared: bool) -> None:
    check(make(rows=None, shared=shared, bias=True))


@pytest.mark.parametrize("amounts", ["none", "bins"])
def test_more_queries_than_a_block(amounts: str) -> None:
    check(make((5, 37, 0), queries=149, amounts=amounts))
    check(make((5, 37, 0), queries=149, amounts=amounts, bias=True))


def test_the_papers_sizes_are_right() -> None:
    shape: dict[str, Any] = {"queries": 64, "heads": 2, "head_dim": 16, "rows": 4001}
    problem = make((900, 1100), amounts="uint8", dropout=0.1, **shape)
    assert ragged_tables.suits(problem)
    check(problem)


@examples(40)
@given(
    lengths=st.lists(st.integers(0, 71), max_size=5),
    queries=st.sampled_from([1, 2, 16, 31]),
    heads=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([8, 11, 16, 37]),
    rows=st.sampled_from([None, 1, 3, 1009]),
    shared=st.booleans(),
    amounts=st.sampled_from(KINDS),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 9),
)
def test_any_shape_is_right(lengths: list[int], **shape: Any) -> None:
    check(make(tuple(lengths), **shape))


@pytest.mark.parametrize("variant", [{"amounts": "uint8"}, {"rows": None, "shared": False}])
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no_cells", "empty_cells"])
def test_nothing_is_attended_to(lengths: tuple[int, ...], variant: dict[str, Any]) -> None:
    found = check(make(lengths, **variant))
    assert not any(gradient.any() for gradient in found.gradients if gradient is not None)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_long_cell_is_right(dropout: float) -> None:
    """20,000 entries, beside a short one."""
    check(make((20_011, 3), queries=5, heads=2, rows=1009, amounts="float", dropout=dropout))


@pytest.mark.parametrize("amounts", ["none", "float"])
def test_a_row_that_all_entries_share_is_right(amounts: str) -> None:
    """The most that can be added to one row: 3,000 cells, and 20,000 times the same number."""
    check(make((2,) * 3001, queries=5, heads=2, head_dim=8, rows=1, amounts=amounts))
    check(make((20_011,), queries=5, heads=2, head_dim=8, rows=3, amounts=amounts))


@pytest.mark.parametrize("score", [90.0, 120.0, 250.0])
@pytest.mark.parametrize("shared", [True, False])
def test_large_scores_are_right(shared: bool, score: float) -> None:
    check(make(shared=shared, amounts="uint8", largest_score=score))


def test_large_amounts_are_right() -> None:
    """All the weight goes to a few entries, whose scores exceed 100."""
    problem = make(amounts="float")
    assert problem.amounts is not None
    check(problem._replace(amounts=(problem.amounts - 1) * 30))


def test_amounts_of_a_hundred_million_are_right() -> None:
    """Forward: there is nothing that a float32 log-sum-exp could say of a score's fraction."""
    problem = make(amounts="float")
    assert problem.amounts is not None
    problem = problem._replace(amounts=(problem.amounts - 1) * 1e8)
    assert ragged_tables.forward(problem)[-1].tolist() == [length > 0 for length in LENGTHS]
    exact = problem._replace(
        **{name: getattr(problem, name).double() for name in ("amounts", *FLOATING[:-1])}
    )
    output, _ = ragged.forward(problem)
    assert error(output, reference.ragged_attention(exact)[0]) <= TOLERANCE


def test_bias_may_exclude_entries_and_all_of_a_cell() -> None:
    problem = make(bias=True, amounts="uint8")
    assert problem.bias is not None
    bias = problem.bias.clone()
    bias[::3] = -math.inf
    bias[3:44, 1] = -math.inf  # a head of a cell
    bias[44] = -math.inf  # a cell
    found = check(problem._replace(bias=bias))
    assert (found.output[2, :, 1] == 0).all()
    assert (found.log_sum_exp[2, 1] == -math.inf).all()
    assert all(tensor.isfinite().all() for tensor in found.gradients if tensor is not None)


def test_the_lowest_finite_bias_is_no_infinite_one() -> None:
    """A cell whose entries all have it attends to them alike, as in PyTorch."""
    problem = make((5, 7), bias=True, shared=False)
    lowest = torch.finfo(torch.float32).min
    problem = problem._replace(bias=torch.full((12, 3), lowest))
    output, _ = ragged.forward(problem)
    assert error(output, reference.ragged_attention(problem)[0]) <= TOLERANCE


@pytest.mark.parametrize("rows", [None, ROWS], ids=["per_entry", "tables"])
def test_dropped_weights_are_those_of_the_definition(rows: int | None) -> None:
    """Most are, so that a single other one is seen; more queries than a block of them."""
    check(make((3, 0, 59), queries=71, rows=rows, dropout=0.83))


def test_dropped_weights_count_in_the_log_sum_exp() -> None:
    problem = make(amounts="uint8", dropout=0.83)
    _, log_sum_exp = ragged.forward(problem)
    assert torch.equal(log_sum_exp, ragged.forward(problem._replace(dropout=0.0, seed=None))[1])


def test_dropout_close_to_one_drops_everything() -> None:
    found = Found(make(dropout=1 - 2**-40))
    assert (found.output == 0).all()
    assert (found.gradients.value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amounts", ["none", "uint8"])
def test_half_precision_is_twice_as_good_as_pytorch(dtype: torch.dtype, amounts: str) -> None:
    """Twice its error at most, that is: results are rounded once."""
    problem = make((41, 0, 97), amounts=amounts, dtype=dtype)
    found = Found(problem)
    exact = by_definition(problem, found, torch.float64)
    rough = by_definition(problem, found, dtype)
    ours = {"output": found.output, "log_sum_exp": found.log_sum_exp}
    ours |= {name: x for name, x in found.gradients._asdict().items() if x is not None}
    assert ours["output"].dtype == ours["query"].dtype == dtype
    for name, tensor in ours.items():
        assert error(tensor, exact[name]) <= 2 * error(rough[name], exact[name]), name


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int32], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_ids_may_be_any_integers(dtype: torch.dtype, shared: bool) -> None:
    problem = make((41, 0, 97), shared=shared, amounts="float")
    assert problem.ids is not None
    expected = Found(problem)
    found = Found(problem._replace(ids=problem.ids.to(dtype)))
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_amounts_may_be_any_floats(dtype: torch.dtype) -> None:
    problem = make((41, 0, 97), amounts="float")
    assert problem.amounts is not None
    check(problem._replace(amounts=problem.amounts.to(dtype)))


def test_what_is_not_a_number_is_never_hidden() -> None:
    """In a query, a looked up key or value, or an amount."""
    for shared in (True, False):
        for name in ("query", "key", "value", "amounts"):
            problem = make((41, 0, 97), shared=shared, amounts="float")
            tensor = getattr(problem, name).clone()
            tensor.view(-1)[: tensor.numel() // 2] = math.nan
            output, _ = ragged.forward(problem._replace(**{name: tensor}))
            assert output[0].isnan().any(), name


# --- the border between the paths --------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cells_beyond_the_range_of_ready_weights_are_computed_anew(dropout: float) -> None:
    """Of three cells one has scores beyond 100; both directions hand over that one alone."""
    problem = make((50, 70, 60), amounts="float", dropout=dropout)
    assert problem.ids is not None
    key, ids = problem.key.clone(), problem.ids % 50
    key[50:] *= 40
    ids[50:120] += 50
    problem = problem._replace(key=key, ids=ids)
    lost = ragged_tables.forward(problem)[-1]
    assert lost.tolist() == [False, True, False]
    found = check(problem)
    _, lost = tables_backward.backward(
        problem, found.gradient, found.log_sum_exp_gradient, found.log_sum_exp
    )
    assert lost.tolist() == [False, True, False]
