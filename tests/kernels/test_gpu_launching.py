"""How work is given to a GPU: nothing waits; faults are told later; graphs, streams and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import EncoderWeights, encode, resolve_backend, synchronize
from torch import Tensor, nn

from cellpatch_fast.cells import RaggedCells

from .conftest import move
from .on_gpu import CUDA, PAPER, batch_of, features_of

encoder = pytest.importorskip("cellpatch_fast.kernels.gpu.encoder")

pytestmark = pytest.mark.gpu

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]


# --- nothing waits -----------------------------------------------------------------------------


@pytest.fixture
def waiting_is_an_error() -> Any:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [[5, 0, 700], [20_000]], ids=["short", "long"])
@pytest.mark.parametrize("options", [{}, {"mean": True}, {"attention": True}], ids=str)
def test_the_host_does_not_wait(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    waiting_is_an_error: None,
    lengths: list[int],
    options: dict[str, bool],
) -> None:
    """Not even with weights that are new, whose tables are made first."""
    torch.cuda.set_sync_debug_mode("default")
    weights, other = (move(random_weights(seed, **PAPER), CUDA) for seed in (0, 1))
    batch = batch_of(random_cells(lengths))
    pads = torch.ones(len(lengths), dtype=torch.int64, device=CUDA)
    features_of(weights, *batch, pads=pads, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    for given in (weights, other):
        features_of(given, *batch, pads=pads, **options)


def test_faults_are_raised_by_the_next_call(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = move(random_weights(), CUDA), random_cells([5, 7])
    offsets, genes, values = batch_of(cells)
    expected = features_of(weights, offsets, genes, values)
    wrong = genes.clone()
    wrong[6] = 101
    found = features_of(weights, offsets, wrong, values)  # does not know it yet
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected[0])
    with pytest.raises(ValueError, match="a gene token is not in the gene embedding"):
        features_of(weights, offsets, genes, values)
    assert torch.equal(features_of(weights, offsets, genes, values), expected)


def test_faults_are_raised_by_synchronize(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, (offsets, genes, values) = move(random_weights(), CUDA), batch_of(random_cells([5, 7]))
    for device in (None, "cuda", torch.device("cuda", torch.cuda.current_device())):
        features_of(weights, offsets.flip(0), genes, values)
        with pytest.raises(ValueError, match="offsets do not start at 0, decrease"):
            synchronize(device)
        synchronize(device)


# --- graphs and compilation --------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5, 0, 700, 31], [9000, 20]], ids=["whole", "split"])
@pytest.mark.parametrize("options", [{}, {"mean": True}, {"attention": True}], ids=str)
def test_a_captured_graph_computes_what_it_is_given_then(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    lengths: list[int],
    options: dict[str, bool],
) -> None:
    """Replayed with other cells of the same shapes, and with weights that were changed since."""
    weights = move(random_weights(**PAPER), CUDA)
    batch = batch_of(random_cells(lengths))
    features_of(weights, *batch, **options)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        features_of(weights, *batch, **options)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = features_of(weights, *batch, **options)
    # as many cells and entries, shared out otherwise
    other = batch_of(random_cells([*reversed(lengths)], seed=1))
    for tensor, new in zip(batch, other, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(captured, features_of(weights, *batch, **options))
    before = captured.clone()
    for tensor in weights.tensors():
        tensor.mul_(1.25)
    graph.replay()
    assert torch.equal(captured, features_of(weights, *batch, **options))
    assert not torch.equal(captured, before)


class Encoder(nn.Module):
    def __init__(self, weights: EncoderWeights) -> None:
        super().__init__()
        tensors, self.structure = weights.flatten()
        self.tensors = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in tensors])

    def forward(self, offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        weights = EncoderWeights.unflatten([*self.tensors], self.structure)
        return encode(weights, offsets, genes, values).features.relu()  # the default backend


def test_compiled_is_equal(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    module = Encoder(move(random_weights(**PAPER), CUDA))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ([5, 0, 17], [3, 1, 2, 4000]):
            batch = batch_of(random_cells(lengths))
            assert torch.equal(compiled(*batch), module(*batch))


def test_exported_is_equal(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    module = Encoder(move(random_weights(**PAPER), CUDA))
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module, batch_of(random_cells([5, 0, 17])), dynamic_shapes=(auto, auto, auto)
    ).module()
    batch = batch_of(random_cells([3, 1, 2, 40]))
    assert torch.equal(exported(*batch), module(*batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype) -> None:
    weights, batch = move(random_weights(**PAPER), CUDA), batch_of(random_cells([50, 0, 17]))
    with torch.autocast("cuda", dtype):
        found = features_of(weights, *batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, encoder.encode(weights, *batch, dtype=dtype).features)


# --- streams and devices -----------------------------------------------------------------------


def test_two_streams(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    """Tables made on one stream are ready for the other, and live as long as it uses them."""
    batch = batch_of(random_cells([700, 0, 3000] * 20))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    several = [move(random_weights(seed, **PAPER), CUDA) for seed in range(4)]
    expected = [features_of(weights, *batch) for weights in several]
    torch.cuda.synchronize()
    encoder.kept.forget()
    found: list[Tensor] = []
    for turn in range(20):  # more sets of weights than are kept: tables are made and dropped
        with torch.cuda.stream(streams[turn % 2]):
            found.append(features_of(several[turn % 3], *batch))
            found.append(features_of(several[(turn + 1) % 4], *batch))
    torch.cuda.synchronize()
    for turn in range(20):
        assert torch.equal(found[2 * turn], expected[turn % 3])
        assert torch.equal(found[2 * turn + 1], expected[(turn + 1) % 4])


def test_a_gpu_that_is_not_the_current_one(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cells, results = random_cells([700, 0, 30]), []
    for device in (torch.device("cuda:0"), torch.device("cuda:1")):
        there = cells.to(device)
        results.append(
            features_of(move(random_weights(), device), there.offsets, there.genes, there.values)
        )
        assert results[-1].device == device
        synchronize(device)
    assert torch.equal(results[0].cpu(), results[1].cpu())


def test_it_is_the_default(
    random_weights: MakeWeights, random_cells: MakeCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELLPATCH_BACKEND", raising=False)
    assert resolve_backend(None, CUDA) == "triton"
    weights, batch = move(random_weights(), CUDA), batch_of(random_cells([50, 0, 17]))
    assert torch.equal(encode(weights, *batch).features, features_of(weights, *batch))
