"""The operator is a good citizen of PyTorch: opcheck, fake shapes, compile, export, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import EncoderWeights, encode
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]

CASES = [
    pytest.param({}, None, False, [5, 0, 17], id="features"),
    pytest.param({}, None, True, [5, 0, 17], id="attention"),
    pytest.param({}, [0, 3, 2], True, [5, 0, 17], id="attention_with_pads"),
    pytest.param({"bins": 6, "projection": None}, None, True, [5, 0, 17], id="bins"),
    pytest.param({"self_blocks": 0}, None, True, [5, 0, 17], id="no_self_attention"),
    pytest.param({"self_blocks": 3}, None, True, [0, 0], id="only_empty_cells"),
    pytest.param({}, None, True, [], id="no_cells"),
]


def arguments(
    weights: EncoderWeights, cells: RaggedCells, pads: list[int] | None, attention: bool
) -> tuple[Any, ...]:
    tensors, structure = weights.flatten()
    number = None if pads is None else torch.tensor(pads)
    return tensors, structure, cells.offsets, cells.genes, cells.values, number, attention


@pytest.mark.parametrize(
    ("options", "pads", "attention", "lengths"), [CASES[0], *CASES[2:4], CASES[-2]]
)
def test_opcheck(
    random_weights: MakeWeights,
    random_cells: MakeCells,
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


def test_outputs_share_no_memory(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    given = arguments(random_weights(self_blocks=3), random_cells([5, 0, 17]), None, True)
    outputs = torch.ops.cellpatch.encode(*given)
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == len(outputs) == 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_equal(
    random_weights: MakeWeights, random_cells: MakeCells, backend: str
) -> None:
    """Without graph breaks, and without compiling again for a batch of another size."""
    weights = random_weights()

    def features(offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        return encode(weights, offsets, genes, values).features.relu()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(features, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for lengths in ([5, 0, 17], [3, 1, 2, 40]):
            cells = random_cells(lengths)
            batch = (cells.offsets, cells.genes, cells.values)
            assert torch.equal(compiled(*batch), features(*batch))
    assert counter.frame_count == 1


class Encoder(nn.Module):
    def __init__(self, weights: EncoderWeights) -> None:
        super().__init__()
        tensors, self.structure = weights.flatten()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])

    def forward(self, offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        weights = EncoderWeights.unflatten([*self.tensors], self.structure)
        return encode(weights, offsets, genes, values, backend="numba").features


def test_exported_is_equal(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    module = Encoder(random_weights())
    cells, other = random_cells([5, 0, 17]), random_cells([3, 1, 2, 40])
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module,
        (cells.offsets, cells.genes, cells.values),
        dynamic_shapes=(auto, auto, auto),
    ).module()
    batch = (other.offsets, other.genes, other.values)
    assert torch.equal(exported(*batch), module(*batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype
) -> None:
    weights, cells = random_weights(), random_cells([5, 0, 17])
    expected = encode(weights, cells.offsets, cells.genes, cells.values).features
    with torch.autocast("cpu", dtype):
        found = encode(weights, cells.offsets, cells.genes, cells.values).features
    assert torch.equal(found, expected)


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
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = random_weights(), random_cells([5, 0, 17])
    weights.genes.requires_grad_()
    with pytest.raises(RuntimeError):
        torch.ops.cellpatch.encode(*arguments(weights, cells, None, False))[0].sum().backward()
