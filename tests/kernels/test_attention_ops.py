"""The operators of ragged attention are good citizens of PyTorch, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import (
    EncoderWeights,
    encode,
    ragged_cross_attention,
    ragged_gather_cross_attention,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .conftest import make_cells, make_weights, move

LENGTHS = [5, 0, 7]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
ENTRIES, ROWS, QUERIES, HEADS, HEAD_DIM = sum(LENGTHS), 11, 7, 3, 13

operator = torch.ops.cellpatch.ragged_attention.default
backward = torch.ops.cellpatch.ragged_attention_backward.default


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = ["per_entry", "queries_per_cell", "gathered", "everything"]


def arguments(case: str, backend: str, device: torch.device) -> tuple[Any, ...]:
    """What the operator takes."""
    cells = len(LENGTHS)
    query = normal(cells if case == "queries_per_cell" else 1, QUERIES, HEADS, HEAD_DIM)
    rows = ROWS if case in ("gathered", "everything") else ENTRIES
    key, value = normal(rows, HEADS, HEAD_DIM), normal(rows, HEADS, HEAD_DIM, seed=1)
    ids = torch.arange(ENTRIES) % ROWS if rows == ROWS else None
    rest: list[Tensor | None] = [None] * 5
    if case == "everything":
        rest = [
            normal(ENTRIES), normal(HEADS, HEAD_DIM), normal(HEADS, HEAD_DIM, seed=1),
            normal(ENTRIES, HEADS), torch.tensor([3]),
        ]  # fmt: skip
    tensors = [query, key, value, OFFSETS, ids, *rest]
    there = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return (*there, 0.3, 0.25 if case == "everything" else 0.0, backend)


def differentiable(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with gradients for all that has them."""
    places = {0, 1, 2, 6, 7, 8}
    return tuple(
        x.clone().requires_grad_() if place in places and x is not None else x
        for place, x in enumerate(given)
    )


@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
def test_opcheck(case: str, backend: str, device: torch.device) -> None:
    """Schema, registration, fake implementation, and tracing of both directions."""
    given = differentiable(arguments(case, backend, device))
    results = torch.library.opcheck(operator, given)
    assert set(results.values()) == {"SUCCESS"}
    plain = arguments(case, backend, device)
    output, log_sum_exp = operator(*plain)
    results = torch.library.opcheck(backward, (output, log_sum_exp.exp(), log_sum_exp, *plain))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), (CASES[3], torch.float16)]
)
def test_fake_tensors_are_like_the_real_ones(
    case: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    given = [
        x.to(dtype) if isinstance(x, Tensor) and place in (0, 1, 2, 6, 7) else x
        for place, x in enumerate(arguments(case, backend, device))
    ]
    output, log_sum_exp = operator(*given)
    real = [output, log_sum_exp, *backward(output, log_sum_exp, log_sum_exp, *given)]
    with FakeTensorMode() as mode:
        as_fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
        output, log_sum_exp = operator(*as_fake)
        fake = [output, log_sum_exp, *backward(output, log_sum_exp, log_sum_exp, *as_fake)]
    described = [
        [None if t is None else (t.shape, t.dtype, t.stride(), t.device) for t in tensors]
        for tensors in (fake, real)
    ]
    assert described[0] == described[1]


def test_outputs_share_no_memory(backend: str, device: torch.device) -> None:
    given = arguments("everything", backend, device)
    output, log_sum_exp = operator(*given)
    outputs = [output, log_sum_exp, *backward(output, log_sum_exp, log_sum_exp, *given)]
    inputs = [x for x in given if isinstance(x, Tensor)]
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *outputs)}
    assert len(memory) == len(inputs) + len(outputs)


def test_second_derivatives_are_refused(backend: str, device: torch.device) -> None:
    given = differentiable(arguments("per_entry", backend, device))
    output, _ = operator(*given)
    (first,) = torch.autograd.grad(output.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only: use backend='reference'"):
        first.sum().backward()


Step = Callable[..., Tensor]


def compiled_step(step: Step, compiler: str) -> Step:
    compiled: Step = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    return compiled


def test_a_compiled_training_step_has_the_gradients_of_eager(
    backend: str, device: torch.device, interpreted: bool
) -> None:
    """The whole encoder, without a graph break, for batches of different sizes."""
    compiler = "aot_eager" if interpreted else "inductor"
    # what follows one block is compiled in the same way, and takes as long again
    tensors, structure = move(make_weights(self_blocks=0), device).flatten()
    leaves = [nn.Parameter(tensor) for tensor in tensors]

    def step(offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        weights = EncoderWeights.unflatten([*leaves], structure)
        features = encode(weights, offsets, genes, values, backend=backend).features
        return (features - 1).square().mean()

    compiled = compiled_step(step, compiler)
    for lengths in ([5, 0, 17], [3, 1, 2, 23]):
        cells = make_cells(lengths).to(device)
        losses = [f(cells.offsets, cells.genes, cells.values) for f in (step, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        eager, traced = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
        for one, right in zip(traced, eager, strict=True):
            assert (one is None) == (right is None)
            if right is not None and one is not None:
                assert (one - right).norm() <= 1e-5 * right.norm() + 1e-7


@pytest.mark.parametrize(("gather", "dropout"), [(False, 0.0), (True, 0.25)])
def test_compiled_attention_has_the_gradients_of_eager(
    backend: str, device: torch.device, gather: bool, dropout: float
) -> None:
    """Dropped weights too, which the compiled step draws anew each time."""
    query, key, value, offsets, ids, *_ = differentiable(
        arguments("gathered" if gather else "per_entry", backend, device)
    )

    def step() -> Tensor:
        if ids is None:
            found = ragged_cross_attention(
                query, key, value, offsets, dropout=dropout, backend=backend
            )
        else:
            found = ragged_gather_cross_attention(
                query, key, value, ids, offsets, dropout=dropout, backend=backend
            )
        return found.output.square().sum() + found.log_sum_exp[[0, 2]].sum()

    compiled = compiled_step(step, "aot_eager")
    gradients = []
    for function in (step, compiled):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(function(), (query, key, value)))
    for one, right in zip(*gradients, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-6)
    if dropout:
        assert compiled() != compiled()
