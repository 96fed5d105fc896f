"""Ragged attention's Triton backend, forward: every kind of input against the oracle in float64.

Errors are at most 1e-5 of a cell's result in float32, and at most twice those of PyTorch in the
same type with float16. Where there is no GPU, Triton's interpreter runs the kernels, a thousand
entries in a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import reference
from cellpatch_fast.kernels.ragged import RaggedAttention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..examples import examples

launch = pytest.importorskip("cellpatch_fast.kernels.gpu.ragged_launch")
launching = pytest.importorskip("cellpatch_fast.kernels.gpu.launching")
faults = pytest.importorskip("cellpatch_fast.kernels.gpu.faults")

TOLERANCE = 1e-5
LENGTHS = [3, 0, 67, 1]
SEED = 7 * 2**40 + 12_345  # both words of it matter
KINDS: dict[str, dict[str, Any]] = {
    "entries": {},
    "queries_of_cells": {"shared": False},
    "table": {"rows": 5},
    "affine": {"rows": 5, "amounts": "affine"},
    "binned": {"rows": 5, "amounts": 3},
    "binned_entries": {"amounts": 3, "shared": False},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.3},
    "many_queries": {"queries": 131, "lengths": [5, 0, 31]},
    "all_at_once": {
        "queries": 67, "lengths": [67, 3], "shared": False, "rows": 5, "amounts": "affine",
        "bias": True, "dropout": 0.3,
    },
    "all_binned": {
        "queries": 67, "lengths": [67, 3], "rows": 5, "amounts": 3, "bias": True, "dropout": 0.3
    },
}  # fmt: skip

each_kind = pytest.mark.parametrize("kind", list(KINDS))


def make_problem(
    device: torch.device,
    lengths: Sequence[int] = LENGTHS,
    *,
    queries: int = 13,
    heads: int = 2,
    head_dim: int = 5,
    shared: bool = True,
    rows: int | None = None,
    amounts: str | int | None = None,
    bias: bool = False,
    dropout: float = 0.0,
    scores: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RaggedAttention:
    """Random input; ``amounts`` is affine or a number of bins, ``scores`` how large those get."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    entries = int(offsets[-1])
    ids = amount = key_part = value_part = added = None
    if rows is not None:
        ids = torch.randint(rows, (entries,), generator=generator, dtype=torch.int32).to(device)
    if amounts == "affine":
        amount = 5 * torch.rand(entries, generator=generator).to(device)
        key_part, value_part = normal(heads, head_dim), normal(heads, head_dim)
    elif amounts is not None:
        bins = int(amounts)
        amount = torch.randint(bins, (entries,), generator=generator).to(device, torch.uint8)
        key_part, value_part = normal(bins, heads, head_dim), normal(bins, heads, head_dim)
    if bias:  # of each fifth entry: -inf, which gives it no weight
        added = torch.randn(entries, heads, generator=generator).to(device)
        added[torch.rand(entries, generator=generator) < 0.2] = -math.inf
    key = normal(rows or entries, heads, head_dim)
    return RaggedAttention(
        normal(1 if shared else len(lengths), queries, heads, head_dim) * scores,
        key, normal(*key.shape), offsets.to(device), ids, amount, key_part, value_part, added,
        torch.tensor([SEED], device=device) if dropout else None, head_dim**-0.5, dropout,
    )  # fmt: skip


def on(problem: RaggedAttention, device: str, dtype: torch.dtype | None = None) -> RaggedAttention:
    """The same problem elsewhere; ``dtype`` is that of everything that is no integer."""
    moved: dict[str, Any] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in problem._asdict().items()
        if isinstance(tensor, Tensor)
    }
    return problem._replace(**moved)


def error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖."""
    assert found.shape == exact.shape
    return float((found.cpu().double() - exact).norm() / exact.norm())


def errors_of_cells(found: Tensor, exact: Tensor) -> Tensor:
    """The same of each cell; 0 where both are 0."""
    assert found.shape == exact.shape
    difference = (found.cpu().double() - exact).flatten(1).norm(dim=1)
    norm = exact.flatten(1).norm(dim=1)
    return difference / torch.where(norm == 0, 1.0, norm)


def check_forward(problem: RaggedAttention) -> tuple[Tensor, Tensor]:
    """Run, assert that the result is as near the exact one as promised, and return it."""
    output, log_sum_exp = launch.forward(problem)
    exact, exact_logarithm = reference.ragged_attention(on(problem, "cpu", torch.float64))
    assert output.dtype == problem.query.dtype
    assert log_sum_exp.dtype == torch.float32
    limit = torch.tensor(TOLERANCE)
    if output.dtype.itemsize == 2:
        rough, _ = reference.ragged_attention(on(problem, "cpu", output.dtype))
        limit = 2 * errors_of_cells(rough, exact).max()
    assert (errors_of_cells(output, exact) <= limit).all()
    tolerance = TOLERANCE if output.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(
        log_sum_exp.cpu().double(), exact_logarithm, rtol=tolerance, atol=tolerance
    )
    return output, log_sum_exp


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels get to write to is full of NaN."""

    def full(self: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=self.device)

    monkeypatch.setattr(launch._Launch, "empty", full)


@pytest.fixture(scope="module")
def backend(triton_backend: None) -> str:
    return "triton"


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        yield


# --- right -------------------------------------------------------------------------------------


@each_kind
def test_every_kind_of_input(device: torch.device, kind: str) -> None:
    check_forward(make_problem(device, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["queries_of_cells", "all_at_once", "all_binned"])
def test_float16(device: torch.device, kind: str) -> None:
    check_forward(make_problem(device, dtype=torch.float16, **KINDS[kind]))


@examples(8)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 31, 64, 67]), min_size=1, max_size=3),
    queries=st.sampled_from([1, 2, 17, 61, 67]),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([2, 7, 8, 13, 19, 37]),
    rows=st.sampled_from([None, 1, 23]),
    amounts=st.sampled_from([None, "affine", 5]),
    shared=st.booleans(),
    bias=st.booleans(),
    scores=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_any_shape(device: torch.device, lengths: list[int], **options: Any) -> None:
    check_forward(make_problem(device, lengths, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cells_longer_than_a_chunk(device: torch.device, dtype: torch.dtype) -> None:
    """Of one chunk exactly, and of three, the last of one entry; with dropped weights."""
    lengths = [1024, 5, 2049, 0]
    check_forward(
        make_problem(device, lengths, queries=5, heads=1, rows=23, dropout=0.2, dtype=dtype)
    )


@pytest.mark.parametrize("scores", [40.0, 80.0])
def test_scores_of_hundreds(device: torch.device, scores: float) -> None:
    problem = make_problem(device, head_dim=16, scores=scores)
    _, log_sum_exp = check_forward(problem)
    assert log_sum_exp[2].abs().max() > 2 * scores


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(device: torch.device, scale: float) -> None:
    check_forward(make_problem(device)._replace(scale=scale))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int32, torch.int64], ids=str)
def test_types_of_ids(device: torch.device, dtype: torch.dtype) -> None:
    problem = make_problem(device, [3, 5], rows=11)
    assert problem.ids is not None
    expected, _ = launch.forward(problem)
    found, _ = launch.forward(problem._replace(ids=problem.ids.to(dtype)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)
def test_types_of_amounts(device: torch.device, dtype: torch.dtype) -> None:
    problem = make_problem(device, [3, 5], amounts="affine")
    assert problem.amounts is not None
    whole = problem.amounts.round()
    expected, _ = check_forward(problem._replace(amounts=whole))
    found, _ = launch.forward(problem._replace(amounts=whole.to(dtype)))
    assert torch.equal(found, expected)


# --- dropped weights ---------------------------------------------------------------------------


def test_dropped_weights_are_the_reference_s(device: torch.device) -> None:
    """Values that are the rows of a unit matrix show every weight."""
    length, queries, heads = 16, 67, 2
    problem = make_problem(
        device, [5, length], queries=queries, heads=heads, head_dim=length, dropout=0.4
    )
    unit = torch.eye(length, device=device)[:, None].expand(-1, heads, -1)
    problem = problem._replace(value=torch.cat([unit[:5], unit]).contiguous())
    output, _ = launch.forward(problem)
    weights = output[1].permute(2, 1, 0).cpu()  # [n, h, q]
    local, cell = torch.arange(length), torch.ones(length, dtype=torch.int64)
    expected = reference.kept(on(problem, "cpu"), cell, local)
    assert torch.equal(weights != 0, expected)
    assert 0.55 < expected.float().mean() < 0.65


@pytest.mark.parametrize("dropout", [1e-12, 1 - 1e-12])
def test_nearly_no_and_nearly_every_weight_dropped(device: torch.device, dropout: float) -> None:
    problem = make_problem(device, dropout=dropout)
    output, _ = launch.forward(problem)
    if dropout > 0.5:
        assert (output == 0).all()
    else:
        assert torch.equal(output, launch.forward(problem._replace(dropout=0.0, seed=None))[0])


# --- cells on their own ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "dropout"])
def test_a_cell_s_bits_do_not_depend_on_its_batch(device: torch.device, kind: str) -> None:
    """But for dropout, whose mask is that of the cell's number: cells before it are emptied."""
    lengths = [67, 3, 1031, 0]
    problem = make_problem(device, lengths, **KINDS[kind] | {"queries": 3, "heads": 1})
    output, log_sum_exp = launch.forward(problem)
    entry_wise = ("ids", "amounts", "bias") + (("key", "value") if problem.ids is None else ())
    for cell, length in enumerate(lengths):
        first = int(problem.offsets[cell])
        own = {
            name: tensor[first : first + length].contiguous()
            for name in entry_wise
            if (tensor := getattr(problem, name)) is not None
        }
        offsets = torch.tensor([0] * (cell + 1) + [length], device=device)
        alone, logarithm = launch.forward(problem._replace(offsets=offsets, **own))
        assert torch.equal(alone[cell], output[cell])
        assert torch.equal(logarithm[cell], log_sum_exp[cell])


def test_cells_that_attend_to_nothing(device: torch.device) -> None:
    """Empty ones, and those whose biases are all -inf; a chunk of such entries in a long cell."""
    problem = make_problem(device, [3, 0, 5, 1030, 2], queries=5, bias=True)
    assert problem.bias is not None
    problem.bias[3:8] = -math.inf
    problem.bias[8 : 8 + 1024] = -math.inf
    problem.bias[8 + 1024] = 0
    output, log_sum_exp = check_forward(problem)
    for cell in (1, 2):
        assert (output[cell] == 0).all()
        assert (log_sum_exp[cell] == -math.inf).all()
    assert log_sum_exp[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_batches_without_entries(device: torch.device, lengths: list[int]) -> None:
    output, log_sum_exp = launch.forward(make_problem(device, lengths))
    assert output.shape == (len(lengths), 13, 2, 5)
    assert (output == 0).all()
    assert (log_sum_exp == -math.inf).all()


# --- bad input ---------------------------------------------------------------------------------

NO_ROW = "an id has no row in the table"
NO_BIN = "an amount no row in the parts"
OFFSETS = "offsets do not start at 0, decrease, or end beyond the entries"


@pytest.fixture
def raised_later(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[], None]:
    """As on a GPU, where the call that is wrong does not know it; raises when called."""
    faults.faults(device).zero_()
    for module in (launch, launching):
        monkeypatch.setattr(module, "raise_faults", lambda device: None)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        faults.raise_faults(device)

    return synchronize


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        (11, torch.int32),
        (-1, torch.int64),
        (2**32 + 3, torch.int64),
        (65_535, torch.uint16),
        (2**32 - 1, torch.uint32),
    ],
)
def test_ids_beyond_the_table(
    device: torch.device, raised_later: Callable[[], None], row: int, dtype: torch.dtype
) -> None:
    problem = make_problem(device, [3, 5, 4], rows=11)
    assert problem.ids is not None
    expected, _ = launch.forward(problem)
    ids = problem.ids.long()
    ids[5] = row
    output, _ = launch.forward(problem._replace(ids=ids.to(dtype)))
    with pytest.raises(ValueError, match=NO_ROW) as caught:
        raised_later()
    assert all(other not in str(caught.value) for other in (NO_BIN, OFFSETS))
    assert torch.equal(output[[0, 2]], expected[[0, 2]])
    assert output.isfinite().all()


def test_amounts_without_a_bin(device: torch.device, raised_later: Callable[[], None]) -> None:
    problem = make_problem(device, [3, 5, 4], amounts=7)
    assert problem.amounts is not None
    expected, _ = launch.forward(problem)
    problem.amounts[5] = 7
    output, _ = launch.forward(problem)
    with pytest.raises(ValueError, match=NO_BIN):
        raised_later()
    assert torch.equal(output[[0, 2]], expected[[0, 2]])
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "offsets", [[1, 3, 12], [0, 9, 4], [0, 3, 13], [0, -5, 12], [0, 2**40, 12]]
)
def test_wrong_offsets(
    device: torch.device, raised_later: Callable[[], None], offsets: list[int]
) -> None:
    problem = make_problem(device, [3, 9])
    launch.forward(problem._replace(offsets=torch.tensor(offsets, device=device)))
    with pytest.raises(ValueError, match=OFFSETS):
        raised_later()


def test_what_was_wrong_is_raised_by_the_next_call(device: torch.device) -> None:
    problem = make_problem(device)
    faults.faults(device)[0] = 1
    with pytest.raises(ValueError, match=NO_ROW):
        launch.forward(problem)
    launch.forward(problem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bfloat16")
def test_the_interpreter_refuses_bfloat16(device: torch.device) -> None:
    with pytest.raises(ValueError, match="interpreter computes bfloat16 products wrongly"):
        launch.forward(make_problem(device, dtype=torch.bfloat16))
