"""Ragged attention's Triton backend, backward: every gradient against the oracle's, in float64.

Bounds as for the forward: 1e-5 in float32 (or the rounding of terms that cancel), twice PyTorch's
error in half precision; of each gradient as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import reference
from cellpatch_fast.kernels.ragged import Gradients, RaggedAttention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..examples import examples
from .conditioning import rounding
from .test_gpu_ragged import KINDS, TOLERANCE, each_kind, error, make_problem, on, poison

launch = pytest.importorskip("cellpatch_fast.kernels.gpu.ragged_launch")
launching = pytest.importorskip("cellpatch_fast.kernels.gpu.launching")
faults = pytest.importorskip("cellpatch_fast.kernels.gpu.faults")

WITH_TABLES = [kind for kind, options in KINDS.items() if "rows" in options]

modes = pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "sorted"])


@pytest.fixture(scope="module")
def backend(triton_backend: None) -> str:
    return "triton"


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        yield


def losses(problem: RaggedAttention, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Random gradients of the output and of the log-sum-exp, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    cells, queries, heads, head_dim = problem.cells, *problem.query.shape[1:]
    of_output = torch.randn(cells, queries, heads, head_dim, generator=generator)
    return of_output.to(problem.query.dtype), torch.randn(
        cells, heads, queries, generator=generator
    )


def differentiate(problem: RaggedAttention, deterministic: bool = False) -> Gradients:
    """Gradients by the kernels."""
    output, log_sum_exp = launch.forward(problem)
    gradient, of_logarithm = (loss.to(output.device) for loss in losses(problem))
    delta = (gradient.float() * output.float()).sum(-1).transpose(1, 2) - of_logarithm
    found: Gradients = launch.backward(
        problem, gradient, delta.contiguous(), log_sum_exp, deterministic=deterministic
    )
    for name, tensor in found._asdict().items():
        like = getattr(problem, name)
        assert (tensor is None) == (like is None)
        if tensor is not None:
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
            assert tensor.is_contiguous()
    return found


def oracle(problem: RaggedAttention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients by PyTorch in another type."""
    gradient, of_logarithm = (loss.to(dtype) for loss in losses(problem))
    there = on(problem, "cpu", dtype)
    leaves = {
        name: tensor.requires_grad_()
        for name in Gradients._fields
        if (tensor := getattr(there, name)) is not None
    }
    output, log_sum_exp = reference.ragged_attention(there._replace(**leaves))
    log_sum_exp = log_sum_exp.masked_fill(log_sum_exp.isinf(), 0.0)
    loss = (output * gradient).sum() + (log_sum_exp * of_logarithm).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check_backward(problem: RaggedAttention, deterministic: bool = False) -> Gradients:
    """Differentiate, assert that every gradient is as near the exact one as promised."""
    found = differentiate(problem, deterministic)
    half = problem.query.dtype.itemsize == 2
    rough = oracle(problem, problem.query.dtype) if half else None
    gradient, of_logarithm = (loss.double() for loss in losses(problem))
    least = rounding(on(problem, "cpu", torch.float64), gradient, of_logarithm)
    for name, exact in oracle(problem, torch.float64).items():
        ours = getattr(found, name)
        if exact.count_nonzero() == 0:
            assert ours.count_nonzero() == 0
        elif rough is not None:
            assert error(ours, exact) <= 2 * error(rough[name], exact), name
        else:
            assert error(ours, exact) <= max(TOLERANCE, least[name] / float(exact.norm())), name
    return found


def same_bits(one: Gradients, other: Gradients) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


# --- right -------------------------------------------------------------------------------------


@each_kind
def test_every_kind_of_input(device: torch.device, kind: str) -> None:
    check_backward(make_problem(device, **KINDS[kind]))


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_sorted_sums(device: torch.device, kind: str) -> None:
    check_backward(make_problem(device, **KINDS[kind]), deterministic=True)


@modes
@pytest.mark.parametrize("kind", ["table", "all_at_once"])
def test_float16(device: torch.device, kind: str, deterministic: bool) -> None:
    check_backward(make_problem(device, dtype=torch.float16, **KINDS[kind]), deterministic)


@examples(6)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 31, 64, 67]), min_size=1, max_size=3),
    queries=st.sampled_from([1, 2, 17, 61, 67]),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([2, 7, 8, 13, 19, 37]),
    rows=st.sampled_from([None, 1, 23]),
    amounts=st.sampled_from([None, "affine", 5]),
    shared=st.booleans(),
    bias=st.booleans(),
    deterministic=st.booleans(),
)
def test_any_shape(
    device: torch.device, lengths: list[int], deterministic: bool, **options: Any
) -> None:
    check_backward(make_problem(device, lengths, **options), deterministic)


@pytest.mark.parametrize("shared", [True, False])
def test_cells_longer_than_a_chunk(device: torch.device, shared: bool) -> None:
    problem = make_problem(
        device, [7, 1031, 0], queries=5, heads=1, shared=shared, amounts="affine", dropout=0.2
    )
    check_backward(problem)


@modes
def test_more_bins_than_fit_in_registers(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.setattr(launch, "MOST_PARTS", 0)
    check_backward(make_problem(device, amounts=3, rows=5), deterministic)


@pytest.mark.parametrize("scores", [40.0, 80.0])
def test_scores_of_hundreds(device: torch.device, scores: float) -> None:
    check_backward(make_problem(device, head_dim=16, scores=scores))


@pytest.mark.parametrize("kind", ["entries", "affine"])
def test_the_widest_heads(device: torch.device, kind: str) -> None:
    check_backward(make_problem(device, **KINDS[kind] | {"head_dim": 127, "lengths": [3, 17]}))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(device: torch.device, scale: float) -> None:
    check_backward(make_problem(device)._replace(scale=scale))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64], ids=str)
def test_types_of_ids(device: torch.device, dtype: torch.dtype) -> None:
    problem = make_problem(device, [5, 3], rows=11)
    assert problem.ids is not None
    expected = differentiate(problem, deterministic=True)
    there = problem._replace(ids=problem.ids.to(dtype))
    assert same_bits(differentiate(there, deterministic=True), expected)


# --- rows of tables ----------------------------------------------------------------------------


@modes
def test_all_entries_look_up_one_row(device: torch.device, deterministic: bool) -> None:
    """More entries than one program sums; the other rows' gradients are 0."""
    problem = make_problem(device, [1031, 5], queries=3, heads=1, rows=11, amounts="affine")
    assert problem.ids is not None
    problem.ids.fill_(7)
    found = check_backward(problem, deterministic)
    others = torch.arange(11, device=device) != 7
    assert (found.key[others] == 0).all()
    assert (found.value[others] == 0).all()
    assert found.key[7].count_nonzero() == found.key[7].numel()


@pytest.mark.parametrize("kind", ["affine", "binned"])
def test_sorted_sums_are_the_same_every_time(device: torch.device, kind: str) -> None:
    problem = make_problem(device, **KINDS[kind])
    first = differentiate(problem, deterministic=True)
    assert same_bits(first, differentiate(problem, deterministic=True))
    for one, other in zip(first, differentiate(problem), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["affine", "binned"])
def test_sorting_head_by_head_changes_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(launch, "MOST_PARTS", 0)
    problem = make_problem(device, **KINDS[kind] | {"heads": 3, "lengths": [3, 5]})
    expected = differentiate(problem, deterministic=True)
    per_head = 8 * problem.entries * problem.head_dim
    for heads in (1, 2):
        monkeypatch.setattr(launch, "ROW_BYTES", heads * per_head)
        assert same_bits(differentiate(problem, deterministic=True), expected)


# --- nothing to attend to ----------------------------------------------------------------------


def test_cells_that_attend_to_nothing(device: torch.device) -> None:
    """Empty ones, and those whose biases are all -inf, have no gradients."""
    problem = make_problem(device, [3, 0, 5, 70], bias=True, shared=False)
    assert problem.bias is not None
    problem.bias[3:8] = -torch.inf
    found = check_backward(problem)
    assert (found.query[1:3] == 0).all()
    assert (found.key[3:8] == 0).all()
    assert found.bias is not None
    assert (found.bias[3:8] == 0).all()


@modes
@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("kind", ["queries_of_cells", "affine", "binned"])
def test_batches_without_entries(
    device: torch.device, lengths: list[int], kind: str, deterministic: bool
) -> None:
    found = differentiate(make_problem(device, lengths, **KINDS[kind]), deterministic)
    for gradient in found:
        assert gradient is None or (gradient == 0).all()


# --- bad input ---------------------------------------------------------------------------------


@modes
def test_ids_and_amounts_beyond_their_tables_are_left_out(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """Reported, and without a part in gradients of the rows that there are."""
    for module in (launch, launching):
        monkeypatch.setattr(module, "raise_faults", lambda device: None)
    problem = make_problem(device, [3, 5, 4], rows=11, amounts=7)
    assert problem.ids is not None
    assert problem.amounts is not None
    problem.ids[:3] = torch.tensor([11, -1, 2**31 - 1], dtype=torch.int32)
    problem.amounts[:3] = 7
    found = differentiate(problem, deterministic)
    others = make_problem(device, [3, 5, 4], rows=11, amounts=7)._replace(
        ids=problem.ids, amounts=problem.amounts
    )
    assert same_bits(found, differentiate(others, deterministic))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"no row in the table.*no row in the parts"):
        faults.raise_faults(device)
