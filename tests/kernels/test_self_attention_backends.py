"""Self-attention: the operator as PyTorch wants it, the choice of a kernel, and what is refused."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import entry_attention, reference
from cellpatch_fast.kernels.entry_attention import ragged_attention, ragged_self_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from .self_attending import (
    HALF,
    HEAD_DIM,
    HEADS,
    LENGTHS,
    Inputs,
    assert_right,
    draw,
    gradient_of,
    part,
    with_gradients,
)

# --- a good citizen of PyTorch -----------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, [0]])
def test_opcheck(lengths: list[int]) -> None:
    query, key, value, offsets = draw(lengths)
    forward = torch.ops.cellpatch.entry_attention
    given = (query, key, value, offsets, offsets.clone(), None, None, 0.3)
    results = torch.library.opcheck(forward.default, given)
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        output, log_sum_exp = forward(*given)
    results = torch.library.opcheck(
        torch.ops.cellpatch.entry_attention_backward.default,
        (
            torch.ones_like(output),
            *(x.detach() for x in given[:3]),
            *given[3:],
            output,
            log_sum_exp,
        ),
    )
    assert set(results.values()) == {"SUCCESS"}


def test_second_derivatives_are_refused() -> None:
    inputs = draw()
    output = ragged_self_attention(*inputs)
    gradients = torch.autograd.grad(output.square().sum(), inputs.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradients[0].sum().backward()


def test_compiled_training_is_equal() -> None:
    """One graph, not compiled again for a batch of another size."""
    weight = torch.randn(3 * HEADS * HEAD_DIM, 11, requires_grad=True)

    def loss(embedded: Tensor, offsets: Tensor) -> Tensor:
        projected = (embedded @ weight.T).unflatten(1, (3, HEADS, HEAD_DIM))
        query, key, value = projected.unbind(1)
        return ragged_self_attention(query, key, value, offsets).square().mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ([5, 0, 17], [3, 2, 40, 1]):
        embedded = torch.randn(sum(lengths), 11)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        found, expected = compiled(embedded, offsets), loss(embedded, offsets)
        assert torch.equal(found, expected)
        (gradient,), (right,) = (torch.autograd.grad(x, weight) for x in (found, expected))
        assert torch.equal(gradient, right)
    assert counter.frame_count == 1


def test_a_compiled_call_checks_offsets_too() -> None:
    query, key, value, offsets = (x.detach() for x in draw())
    compiled = torch.compile(ragged_self_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="offsets must not decrease"):
        compiled(query, key, value, offsets[torch.tensor([0, 3, 1, 2, 4])])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast(dtype: torch.dtype, backend: str | None) -> None:
    """As if the inputs had been in that type; gradients come in their own."""
    inputs = draw()
    with torch.autocast("cpu", dtype):
        output, *gradients = with_gradients(inputs, backend=backend)
    half = inputs.having(x.detach().to(dtype).requires_grad_() for x in inputs.leaves)
    expected, *rights = with_gradients(half, backend=backend)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert all(x.dtype == torch.float32 for x in gradients)
    assert all(torch.equal(x, y.float()) for x, y in zip(gradients, rights, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    inputs = draw(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = ragged_self_attention(*inputs)
    assert torch.equal(found, ragged_self_attention(*inputs))


@pytest.mark.parametrize("function", [ragged_self_attention, ragged_attention])
def test_the_example(function: Callable[..., Tensor]) -> None:
    test = doctest.DocTestFinder().find(function, globs=vars(entry_attention))[0]
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


# --- the choice --------------------------------------------------------------------------------


def test_the_environment_can_choose_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(reference, "entry_attention", refuse)
    ragged_self_attention(*draw())
    monkeypatch.setenv("CELLPATCH_BACKEND", "reference")
    with pytest.raises(AssertionError, match="called"):
        ragged_self_attention(*draw())


@pytest.mark.parametrize("head_dim", [7, 16])
@pytest.mark.parametrize("scale", [None, 0.31])
@pytest.mark.parametrize(
    ("dtype", "installed", "chosen"),
    [
        (torch.float32, True, "memory_efficient"),
        (torch.float16, False, "varlen"),
        (torch.bfloat16, False, "varlen"),
        (torch.float64, True, "reference"),
    ],
)
def test_what_is_traced_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    installed: bool,
    chosen: str,
    scale: float | None,
    head_dim: int,
) -> None:
    """The kernels of CUDA take what they are given, as far as shapes and types tell."""
    monkeypatch.setattr(entry_attention, "FLASH_ATTN_INSTALLED", installed)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        leaves = [torch.empty(25, HEADS, head_dim, dtype=dtype, device="cuda") for _ in range(3)]
        inputs = Inputs._make([*leaves, torch.empty(5, dtype=torch.int64, device="cuda")])
        assert entry_attention._choose(inputs.query, None) == chosen
        if chosen == "reference":
            return
        output = ragged_self_attention(*inputs, scale=scale, max_length=19)
    assert (output.shape, output.dtype) == (inputs.query.shape, dtype)
    assert output.device.type == "cuda"


def test_flash_attn_is_preferred_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_attention, "FLASH_ATTN_INSTALLED", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        query, wide = (torch.empty(5, 3, d, device="cuda").bfloat16() for d in (7, 257))
    assert entry_attention._choose(query, None) == "flash_attn"
    assert entry_attention._choose(wide, None) == "memory_efficient"


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"query": torch.zeros(25, 21)}, "heads, head_dim", id="two_dimensions"),
        pytest.param({"query": torch.zeros(25, 0, 7)}, "no heads", id="no_heads"),
        pytest.param({"key": torch.zeros(25, 7, 3)}, r"key has shape \[25, 7, 3\]", id="swapped"),
        pytest.param({"value": torch.zeros(24, 3, 7)}, "value has shape", id="fewer_entries"),
        pytest.param({"value": torch.zeros(25, 3, 7).half()}, "one dtype", id="mixed_types"),
        pytest.param({"query": torch.zeros(25, 3, 7).long()}, "float16, bfloat16", id="integers"),
        pytest.param({"key": torch.zeros(25, 3, 7, device="meta")}, "on meta", id="device"),
        pytest.param({"offsets": torch.tensor([0.0, 25.0])}, "int32 or int64", id="float_offsets"),
        pytest.param({"offsets": torch.tensor([])}, "int32 or int64", id="no_offsets"),
        pytest.param({"offsets": torch.tensor([[0, 25]])}, "int32 or int64", id="offsets_2d"),
        pytest.param({"offsets": torch.tensor([0, 24])}, "0 to the number", id="too_short"),
        pytest.param({"offsets": torch.tensor([0, 26])}, "0 to the number", id="too_long"),
        pytest.param({"offsets": torch.tensor([1, 25])}, "0 to the number", id="not_from_0"),
        pytest.param({"offsets": torch.tensor([0, 9, 5, 25])}, "decrease", id="decreasing"),
        pytest.param({"max_length": 18}, "a cell has 19 entries", id="max_length"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_refusals(change: dict[str, Any], message: str, backend: str | None) -> None:
    given: dict[str, Any] = draw()._asdict() | change
    with pytest.raises(ValueError, match=message):
        ragged_self_attention(**given, backend=backend)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("triton", "choose from reference, numba, memory_efficient, varlen, flash_attn"),
        ("memory_efficient", "runs on a CUDA GPU, but query is on cpu; backend=None chooses"),
        ("varlen", "runs on a CUDA GPU, but query is on cpu; backend=None chooses"),
        ("flash_attn", "runs on a CUDA GPU, but query is on cpu; backend=None chooses"),
    ],
)
def test_backends_that_cannot_compute_here(backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_self_attention(*draw(), backend=backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "message"),
    [
        ("flash_attn", torch.float16, 7, r"pip install 'cellpatch-fast\[flash\]'"),
        ("varlen", torch.float16, 257, "at most 256, found 257"),
        ("varlen", torch.float32, 7, r"float16 and bfloat16, but query is torch\.float32"),
        ("memory_efficient", torch.float64, 7, "has no float64 on a CUDA GPU"),
        ("numba", torch.float32, 7, "runs on a CPU, but query is on cuda"),
    ],
)
def test_what_kernels_of_cuda_refuse(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    head_dim: int,
    message: str,
) -> None:
    monkeypatch.setattr(entry_attention, "FLASH_ATTN_INSTALLED", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        leaves = [torch.empty(5, 3, head_dim, dtype=dtype, device="cuda") for _ in range(3)]
        inputs = Inputs._make([*leaves, torch.empty(2, dtype=torch.int64, device="cuda")])
        with pytest.raises(ValueError, match=message):
            ragged_self_attention(*inputs, max_length=5, backend=backend)


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture(params=["memory_efficient", "varlen", "flash_attn"])
def on_cuda(request: pytest.FixtureRequest) -> str:
    if request.param == "flash_attn" and not entry_attention.FLASH_ATTN_INSTALLED:
        pytest.skip("flash-attn is not installed")
    return request.param


def types_of(backend: str) -> list[torch.dtype]:
    return [torch.float32, *HALF] if backend == "memory_efficient" else HALF


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 13, 16, 127])
@pytest.mark.parametrize("scale", [None, 0.31])
def test_kernels_of_cuda_against_float64(on_cuda: str, head_dim: int, scale: float | None) -> None:
    for dtype in types_of(on_cuda):
        inputs = draw([5, 0, 211, 1, 797], HEADS, head_dim, dtype=dtype, device="cuda")
        assert_right(with_gradients(inputs, scale=scale, backend=on_cuda), inputs, scale=scale)


@pytest.mark.gpu
def test_a_cell_depends_on_itself_alone_on_a_gpu(on_cuda: str) -> None:
    dtype = types_of(on_cuda)[0]
    inputs = draw([5, 0, 211, 1, 797], dtype=dtype, device="cuda")
    together = ragged_self_attention(*inputs, backend=on_cuda)
    for start, stop in itertools.pairwise(inputs.offsets.tolist()):
        alone = ragged_self_attention(*part(inputs, start, stop), backend=on_cuda)
        assert torch.equal(together[start:stop], alone)


@pytest.mark.gpu
def test_deterministic_gradients_on_a_gpu(on_cuda: str) -> None:
    inputs = draw([797, 0, 3001], dtype=types_of(on_cuda)[0], device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(inputs, backend=on_cuda) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_training_is_equal_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = draw([5, 0, 211], dtype=dtype, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        expected = with_gradients(inputs, max_length=211)
        compiled = torch.compile(ragged_self_attention, fullgraph=True, backend="aot_eager")
        output = compiled(*inputs, max_length=211)
        found = [output, *torch.autograd.grad(output, inputs.leaves, gradient_of(output))]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_contents_are_looked_at_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, offsets = draw(device="cuda")
    monkeypatch.setenv("CELLPATCH_CHECK", "1")
    with pytest.raises(ValueError, match="a cell has 19 entries"):
        ragged_self_attention(query, key, value, offsets, max_length=18)
