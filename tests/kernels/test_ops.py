"""The operators are good citizens of PyTorch: opcheck, fake shapes, compile, export, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, encode, patch_attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cellpatch_fast.cells import RaggedCells

from .conftest import errors_per_cell, move

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]

CASES = [
    pytest.param({}, None, False, [5, 0], id="features"),
    pytest.param({}, None, True, [5, 0], id="attention"),
    pytest.param({}, [0, 3], True, [5, 0], id="attention_with_pads"),
    pytest.param({"bins": 6, "projection": None}, None, True, [5, 0], id="bins"),
    pytest.param({"self_blocks": 0}, None, True, [5, 0], id="no_self_attention"),
    pytest.param({"self_blocks": 3}, None, True, [0, 0], id="only_empty_cells"),
    pytest.param({}, None, True, [], id="no_cells"),
]


Arguments = Callable[..., tuple[Any, ...]]


@pytest.fixture
def arguments(backend: str, device: torch.device) -> Arguments:
    """What the operator takes."""

    def make(
        weights: EncoderWeights, cells: RaggedCells, pads: list[int] | None, attention: bool
    ) -> tuple[Any, ...]:
        tensors, structure = move(weights, device).flatten()
        number = None if pads is None else torch.tensor(pads, device=device)
        there = cells.to(device)
        batch = there.offsets, there.genes, there.values
        return tensors, structure, *batch, number, attention, False, backend

    return make


@pytest.mark.parametrize(
    ("options", "pads", "attention", "lengths"), [CASES[0], *CASES[2:4], CASES[-2]]
)
def test_opcheck(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    arguments: Arguments,
    options: dict[str, Any],
    pads: list[int] | None,
    attention: bool,
    lengths: list[int],
) -> None:
    """Schema, registration, fake implementation, and tracing with dynamic shapes."""
    given = arguments(random_weights(**options), random_cells(lengths), pads, attention)
    results = torch.library.opcheck(torch.ops.cellpatch.encode.default, given)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("options", "pads", "attention", "lengths"), CASES)
def test_fake_shapes_are_the_real_ones(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    arguments: Arguments,
    options: dict[str, Any],
    pads: list[int] | None,
    attention: bool,
    lengths: list[int],
) -> None:
    given = arguments(random_weights(**options), random_cells(lengths), pads, attention)
    real = torch.ops.cellpatch.encode(*given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        as_fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given[1:]]
        fake = torch.ops.cellpatch.encode([mode.from_tensor(t) for t in given[0]], *as_fake)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [
        (t.shape, t.dtype, t.stride()) for t in real
    ]


@pytest.mark.parametrize("pads", [None, [1, 0]])
def test_opcheck_of_the_cross_attention(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device_of: Callable[[str], torch.device],
    triton_backend: None,
    pads: list[int] | None,
) -> None:
    device = device_of("triton")
    cells = random_cells([5, 0]).to(device)
    tensors, structure = move(random_weights(), device).flatten()
    number = None if pads is None else torch.tensor(pads, device=device)
    given = (tensors, structure, cells.offsets, cells.genes, cells.values, number)
    results = torch.library.opcheck(torch.ops.cellpatch.patch_attention.default, given)
    assert set(results.values()) == {"SUCCESS"}


def test_outputs_share_no_memory(
    random_weights: MakeWeights, random_cells: MakeCells, arguments: Arguments
) -> None:
    given = arguments(random_weights(self_blocks=3), random_cells([5, 0, 17]), None, True)
    outputs = torch.ops.cellpatch.encode(*given)
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == len(outputs) == 6


@pytest.mark.parametrize("operation", ["encode", "patch_attention"])
def test_compiled_is_equal(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    backend: str,
    device: torch.device,
    operation: str,
) -> None:
    """Without graph breaks, and without compiling again for a batch of another size."""
    weights = move(random_weights(self_blocks=0), device)

    def features(offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        if operation == "encode":
            return encode(weights, offsets, genes, values, backend=backend).features.relu()
        return patch_attention(weights, offsets, genes, values, backend=backend)[0].relu()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(features, fullgraph=True, backend=counter, dynamic=True)
    compilations = set()
    with torch.no_grad():
        for lengths in ([5, 0, 17], [3, 1, 2, 40]):
            cells = random_cells(lengths).to(device)
            batch = (cells.offsets, cells.genes, cells.values)
            assert torch.equal(compiled(*batch), features(*batch))
            compilations.add(counter.frame_count)
    assert len(compilations) == 1


class Encoder(nn.Module):
    def __init__(self, weights: EncoderWeights, backend: str) -> None:
        super().__init__()
        self.backend = backend
        tensors, self.structure = weights.flatten()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])

    def forward(self, offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        weights = EncoderWeights.unflatten([*self.tensors], self.structure)
        return encode(weights, offsets, genes, values, backend=self.backend).features


def test_exported_is_equal(
    random_weights: MakeWeights, random_cells: MakeCells, backend: str, device: torch.device
) -> None:
    module = Encoder(move(random_weights(), device), backend)
    cells, other = (random_cells(lengths).to(device) for lengths in ([5, 0, 17], [3, 1, 2, 40]))
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module,
        (cells.offsets, cells.genes, cells.values),
        dynamic_shapes=(auto, auto, auto),
    ).module()
    batch = (other.offsets, other.genes, other.values)
    assert torch.equal(exported(*batch), module(*batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_for_numba(
    random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype
) -> None:
    weights, cells = random_weights(), random_cells([5, 0, 17])
    batch = cells.offsets, cells.genes, cells.values
    expected = encode(weights, *batch, backend="numba").features
    with torch.autocast("cpu", dtype):
        found = encode(weights, *batch, backend="numba").features
    assert torch.equal(found, expected)


@pytest.mark.parametrize("operation", ["encode", "patch_attention"])
def test_autocast_chooses_the_type_of_triton_s_tables(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    triton_backend: None,
    device_of: Callable[[str], torch.device],
    operation: str,
) -> None:
    """The bits are those of weights in that type; the result is float32."""
    device = device_of("triton")
    weights, cells = move(random_weights(), device), random_cells([5, 17]).to(device)

    def run(dtype: torch.dtype | None) -> Tensor:
        given = (weights, cells.offsets, cells.genes, cells.values)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            if operation == "encode":
                return encode(*given, backend="triton").features
            return patch_attention(*given, backend="triton")[0]

    full, half = run(None), run(torch.float16)
    assert half.dtype == torch.float32
    assert 1e-5 < errors_per_cell(half, full).max() < 1e-2
    if device.type == "cpu":
        with pytest.raises(ValueError, match="interpreter computes bfloat16 products wrongly"):
            run(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(
    random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype
) -> None:
    """At most twice the error that half precision has without autocast."""
    weights, cells = random_weights(), random_cells([5, 0, 17])
    gradients = []
    for enabled in (False, True):
        genes = weights.genes.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            features = encode(
                weights._replace(genes=genes), cells.offsets, cells.genes, cells.values
            ).features
        features.float().square().sum().backward()
        assert genes.grad is not None
        gradients.append(genes.grad)
    exact, rough = gradients
    assert (rough - exact).norm() <= 0.1 * exact.norm()


def test_backward_through_the_operator_itself_is_refused(
    random_weights: MakeWeights, random_cells: MakeCells, arguments: Arguments
) -> None:
    weights, cells = random_weights(), random_cells([5, 0, 17])
    weights.genes.requires_grad_()
    with pytest.raises(RuntimeError):
        torch.ops.cellpatch.encode(*arguments(weights, cells, None, False))[0].sum().backward()


def test_values_that_ask_for_gradients_are_encoded_without_them(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    """On every thread, whatever the settings of the others: 67 cells are several tasks."""
    weights, cells = random_weights(), random_cells([3] * 67)
    values = cells.values.float()
    given = (weights, cells.offsets, cells.genes)
    expected = encode(*given, values).features
    with torch.no_grad():
        found = encode(*given, values.requires_grad_()).features
    assert torch.equal(found, expected)
    assert not found.requires_grad
