"""What only a GPU shows: every type and length, large batches, the same bits, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cellpatch_fast.kernels import (
    Encoded,
    EncoderWeights,
    encode,
    reference,
    synchronize,
)
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from .conftest import convert, errors_per_cell, move, poisoned
from .on_gpu import CUDA, PAPER, batch_of, features_of

encoder = pytest.importorskip("cellpatch_fast.kernels.gpu.encoder")

pytestmark = pytest.mark.gpu

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Compare = Callable[..., Encoded]

TYPES = [torch.float32, torch.float16, torch.bfloat16]

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(scope="module")
def backend() -> str:
    return "triton"


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
    whole = features_of(there, *batch_of(cells)).cpu()
    assert whole.isfinite().all()
    parts = [
        features_of(there, *batch_of(cells.slice(start, start + 1009))).cpu()
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
    batch = batch_of(random_cells([5000, 0, 77, 1024] * 50))
    first = features_of(weights, *batch)
    assert all(torch.equal(features_of(weights, *batch), first) for _ in range(5))


# --- memory ------------------------------------------------------------------------------------


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
