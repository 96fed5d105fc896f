"""Ragged attention as only a GPU shows it: bfloat16, long cells, atomics that meet, graphs."""

from __future__ import annotations

import pytest
import torch
from cellpatch_fast.kernels.ragged import RaggedAttention

from .test_gpu_ragged import check_forward, make_problem
from .test_gpu_ragged_backward import check_backward, differentiate, same_bits

launch = pytest.importorskip("cellpatch_fast.kernels.gpu.ragged_launch")

pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
PAPER = {"queries": 64, "heads": 2, "head_dim": 16}

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def on_gpu(lengths: list[int], dtype: torch.dtype, **options: object) -> RaggedAttention:
    return make_problem(torch.device("cuda"), lengths, dtype=dtype, **options)  # type: ignore[arg-type]


@each_type
@pytest.mark.parametrize("amounts", [None, "affine", 6])
def test_cellpatch_s_size(dtype: torch.dtype, amounts: str | int | None) -> None:
    lengths = [1, 0, 31, 1000, 20_000, 129, 5000]
    problem = on_gpu(lengths, dtype, rows=60_000, amounts=amounts, **PAPER)
    check_forward(problem)
    check_backward(problem)
    check_backward(problem, deterministic=True)


@each_type
@pytest.mark.parametrize("head_dim", [13, 32, 64, 128])
@pytest.mark.parametrize("queries", [1, 64, 200])
@pytest.mark.parametrize("shared", [True, False])
def test_any_width(dtype: torch.dtype, head_dim: int, queries: int, shared: bool) -> None:
    problem = on_gpu(
        [1, 0, 129, 2100], dtype, queries=queries, head_dim=head_dim, shared=shared, bias=True,
        dropout=0.1,
    )  # fmt: skip
    check_forward(problem)
    check_backward(problem)


@each_type
def test_many_cells_that_share_one_row(dtype: torch.dtype) -> None:
    """Where atomics meet most; and where sums in a fixed order are longest."""
    problem = on_gpu([503] * 97, dtype, rows=11, amounts="affine", **PAPER)
    assert problem.ids is not None
    problem.ids.fill_(7)
    check_backward(problem)
    first = check_backward(problem, deterministic=True)
    for _ in range(3):
        assert same_bits(first, differentiate(problem, deterministic=True))


def test_a_cell_s_bits_do_not_depend_on_its_batch() -> None:
    lengths = [1031, 3, 20_000, 0, 700]
    problem = on_gpu(lengths, torch.bfloat16, rows=60_000, amounts=6, **PAPER)
    output, _ = launch.forward(problem)
    assert problem.ids is not None
    assert problem.amounts is not None
    for cell, length in enumerate(lengths):
        first = int(problem.offsets[cell])
        ids = problem.ids[first : first + length]
        amounts = problem.amounts[first : first + length]
        offsets = torch.tensor([0, length], device="cuda")
        alone, _ = launch.forward(problem._replace(offsets=offsets, ids=ids, amounts=amounts))
        assert torch.equal(alone[0], output[cell])


def test_a_cuda_graph_computes_what_its_tensors_hold() -> None:
    problem = on_gpu([700, 1031], torch.bfloat16, rows=101, amounts="affine", **PAPER)
    launch.forward(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = launch.forward(problem)
    problem.query.mul_(2)
    graph.replay()
    expected, _ = launch.forward(problem)
    assert torch.equal(output, expected)
