"""What only a GPU shows: every type and length, large batches, streams, graphs, nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import (
    Encoded,
    EncoderWeights,
    encode,
    reference,
    resolve_backend,
    synchronize,
)
from torch import Tensor, nn

from cellpatch_fast.cells import RaggedCells

from .conftest import convert, errors_per_cell, move, poisoned

encoder = pytest.importorskip("cellpatch_fast.kernels.gpu.encoder")
faults = pytest.importorskip("cellpatch_fast.kernels.gpu.faults")

pytestmark = pytest.mark.gpu

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]
Batch = tuple[Tensor, Tensor, Tensor]

CUDA = torch.device("cuda")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
PAPER = {"head_dim": 16, "patches": 64, "mlp_dim": 64, "projection": 10, "self_blocks": 2}

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(scope="module")
def backend() -> str:
    return "triton"


def on_gpu(cells: RaggedCells) -> Batch:
    there = cells.to(CUDA)
    return there.offsets, there.genes, there.values


def features_of(weights: EncoderWeights, *batch: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return encode(weights, *batch, backend="triton", **options).features


# --- right -------------------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("values", ["integers", "float16", "float32", "binned"])
def test_every_type_and_length(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    dtype: torch.dtype,
    values: str,
) -> None:
    """The paper's sizes and the largest vocabulary, cells of 0 to 70,000 genes."""
    bins = 6 if values == "binned" else None
    weights = random_weights(**PAPER, genes=70_000, bins=bins, dtype=dtype)
    lengths = [1, 0, 31, 1000, 70_000, 129, 5000, 20_000]
    kind = {"bins": 6} if values in ("integers", "binned") else {"bins": None}
    if kind["bins"] is None:
        kind["dtype"] = getattr(torch, values)
    compare(weights, random_cells(lengths, genes=70_000, **kind))


@each_type
@pytest.mark.parametrize("scores", [90.0, 200.0])
def test_every_type_with_high_scores(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    dtype: torch.dtype,
    scores: float,
) -> None:
    weights = random_weights(**PAPER, gene_scores=scores, value_scores=scores, dtype=dtype)
    cells = random_cells([1, 3000, 97, 0, 700], bins=None)
    compare(weights, cells, torch.tensor([0, 0, 5, 2, 3000]))
    compare(weights, cells, attention=True)


def test_ten_million_entries(random_weights: MakeWeights) -> None:
    """Of 10,007 cells; a sample of them against the reference, all against another batch."""
    weights = random_weights(**PAPER, genes=60_000)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 2000, (10_007,), generator=generator)
    entries = int(lengths.sum())
    assert entries > 9_900_000
    cells = RaggedCells(
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.randint(0, 60_000, (entries,), generator=generator, dtype=torch.int32).to(
            torch.uint16
        ),
        torch.randint(0, 6, (entries,), generator=generator).to(torch.uint8),
    )
    there = move(weights, CUDA)
    whole = features_of(there, *on_gpu(cells)).cpu()
    assert whole.isfinite().all()
    parts = [
        features_of(there, *on_gpu(cells.slice(start, start + 1009))).cpu()
        for start in range(0, len(cells), 1009)
    ]
    assert torch.equal(torch.cat(parts), whole)
    some = torch.arange(0, len(cells), 97)
    sample = cells.take(some)
    exact = reference.encode(
        convert(weights, torch.float64), sample.offsets, sample.genes, sample.values
    ).features
    assert errors_per_cell(whole[some], exact).max() <= 1e-5


@pytest.mark.parametrize("split", [False, True])
def test_offsets_beyond_two_gigabytes(random_weights: MakeWeights, split: bool) -> None:
    """Genes and values are more than 2^31 bytes each: positions take 64 bits. Needs 9 GB."""
    if torch.cuda.get_device_properties(CUDA).total_memory < 12 << 30:
        pytest.skip("this GPU has less than 12 GB")
    weights = move(random_weights(self_blocks=0, dtype=torch.float16), CUDA)
    entries = (1 << 31) + 5003
    genes = torch.zeros(entries, dtype=torch.uint16, device=CUDA)
    values = torch.zeros(entries, dtype=torch.float16, device=CUDA)
    last = 2500
    generator = torch.Generator().manual_seed(0)
    tail = torch.randint(0, 101, (last,), generator=generator, dtype=torch.int32)
    genes.view(torch.int16)[-last:] = tail.to(CUDA, torch.int16)
    values[-last:] = torch.rand(last, generator=generator).to(CUDA, torch.float16)
    # the first cells are short and the rest lies between: entries that no cell has would be refused
    # by nobody, but one cell of two billion would take long
    cut = entries - last
    steps = torch.arange(0, cut, 1 << 20, device=CUDA)
    ends = torch.tensor([cut, cut + 1200, entries], device=CUDA)
    offsets = torch.cat([steps, ends])
    found = encoder.encode(weights, offsets, genes, values, split=split).features[-2:]
    alone = torch.tensor([0, 1200, last], device=CUDA)
    expected = encoder.encode(
        weights, alone, genes[-last:].clone(), values[-last:].clone(), split=split
    ).features
    synchronize()
    assert torch.equal(found, expected)


def test_attention_beyond_two_gigabytes(random_weights: MakeWeights) -> None:
    """Weights of 2^31 bytes and more: an entry's place takes 64 bits. Needs 3 GB."""
    weights = move(random_weights(**PAPER), CUDA)
    cells, length = 5, 1_000_003
    entries = cells * length
    assert entries * 2 * 64 * 4 > 1 << 31
    genes = (torch.arange(entries, device=CUDA) % 101).to(torch.int32)
    values = (torch.arange(entries, device=CUDA) % 7).to(torch.uint8)
    offsets = torch.arange(cells + 1, device=CUDA) * length
    with poisoned(), torch.no_grad():
        whole = encode(weights, offsets, genes, values, attention=True, backend="triton")
        last = slice(entries - length, None)
        alone = encode(
            weights, offsets[:2], genes[last].clone(), values[last].clone(),
            attention=True, backend="triton",
        )  # fmt: skip
    synchronize()
    assert whole.cross_attention is not None
    assert alone.cross_attention is not None
    assert torch.equal(whole.cross_attention[last], alone.cross_attention)


# --- the same bits -----------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("values", ["integers", "continuous", "binned"])
def test_batch_invariance(
    random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype, values: str
) -> None:
    """Alone, in any order, in batches of any size, split or whole."""
    bins = 6 if values == "binned" else None
    weights = move(
        random_weights(**PAPER, bins=bins, gene_scores=60.0, value_scores=20.0, dtype=dtype), CUDA
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (301,), generator=generator)
    lengths[::50] = torch.randint(1000, 9000, (7,), generator=generator)
    cells = random_cells(lengths.tolist(), bins=None if values == "continuous" else 6).to(CUDA)
    pads = torch.randint(0, 3, (301,), generator=generator).to(CUDA)

    def features(some: RaggedCells, number: Tensor, split: bool | None = None) -> Tensor:
        with poisoned():
            return encoder.encode(
                weights, some.offsets, some.genes, some.values, pads=number, split=split
            ).features

    whole = features(cells, pads)
    assert whole.isfinite().all()
    for split in (False, True):
        assert torch.equal(features(cells, pads, split), whole)
    order = torch.randperm(301, generator=generator).to(CUDA)
    assert torch.equal(features(cells.take(order), pads[order]), whole[order])
    for size in (1, 7, 100):
        parts = [
            features(cells.slice(i, i + size), pads[i : i + size]) for i in range(0, 301, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    synchronize()


@each_type
def test_runs_are_the_same_every_time(
    random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype
) -> None:
    weights = move(random_weights(**PAPER, dtype=dtype), CUDA)
    batch = on_gpu(random_cells([5000, 0, 77, 1024] * 50))
    first = features_of(weights, *batch)
    assert all(torch.equal(features_of(weights, *batch), first) for _ in range(5))


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
    batch = on_gpu(random_cells(lengths))
    pads = torch.ones(len(lengths), dtype=torch.int64, device=CUDA)
    features_of(weights, *batch, pads=pads, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    for given in (weights, other):
        features_of(given, *batch, pads=pads, **options)


def test_faults_are_raised_by_the_next_call(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = move(random_weights(), CUDA), random_cells([5, 7])
    offsets, genes, values = on_gpu(cells)
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
    weights, (offsets, genes, values) = move(random_weights(), CUDA), on_gpu(random_cells([5, 7]))
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
    batch = on_gpu(random_cells(lengths))
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
    other = on_gpu(random_cells([*reversed(lengths)], seed=1))
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
            batch = on_gpu(random_cells(lengths))
            assert torch.equal(compiled(*batch), module(*batch))


def test_exported_is_equal(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    module = Encoder(move(random_weights(**PAPER), CUDA))
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module, on_gpu(random_cells([5, 0, 17])), dynamic_shapes=(auto, auto, auto)
    ).module()
    batch = on_gpu(random_cells([3, 1, 2, 40]))
    assert torch.equal(exported(*batch), module(*batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(random_weights: MakeWeights, random_cells: MakeCells, dtype: torch.dtype) -> None:
    weights, batch = move(random_weights(**PAPER), CUDA), on_gpu(random_cells([50, 0, 17]))
    with torch.autocast("cuda", dtype):
        found = features_of(weights, *batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, encoder.encode(weights, *batch, dtype=dtype).features)


# --- streams and devices -----------------------------------------------------------------------


def test_two_streams(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    """Tables made on one stream are ready for the other, and live as long as it uses them."""
    batch = on_gpu(random_cells([700, 0, 3000] * 20))
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
    weights, batch = move(random_weights(), CUDA), on_gpu(random_cells([50, 0, 17]))
    assert torch.equal(encode(weights, *batch).features, features_of(weights, *batch))


def test_memory_is_that_of_inputs_outputs_and_tables(random_weights: MakeWeights) -> None:
    """And does not depend on the longest cell."""
    weights = move(random_weights(**PAPER, genes=60_000, dtype=torch.bfloat16), CUDA)
    entries, cells = 20_000_000, 20_000
    genes = torch.randint(0, 60_000, (entries,), device=CUDA, dtype=torch.int32)
    values = torch.randint(0, 6, (entries,), device=CUDA).to(torch.uint8)
    for lengths in ([entries // cells] * cells, [70_000, *([996] * (cells - 1))]):
        offsets = torch.tensor([0, *lengths], device=CUDA).cumsum(0)
        features_of(weights, offsets, genes, values)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = features_of(weights, offsets, genes, values)
        torch.cuda.synchronize()
        grown = torch.cuda.max_memory_allocated() - before
        assert grown <= 1.1 * found.numel() * found.element_size() + (1 << 20)
