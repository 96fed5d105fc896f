"""The fast backends against the reference in float64: relative error at most 1e-5 per cell.

The attention's side of that promise: lengths, duplicated genes, any range of scores, all kinds of
values and tokens, pads, and attention weights. `test_blocks` has the rest of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, reference
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]

UNDERFLOW = 93.0  # nats: exp(-93) is 0 beside numbers that float32 can hold the sum of


def score_parts(weights: EncoderWeights, cells: RaggedCells) -> tuple[Tensor, Tensor]:
    """Gene part and value part of the scores of entries, float64 [n, h, p] each."""
    tensors, structure = weights.flatten()
    exact = EncoderWeights.unflatten([tensor.double() for tensor in tensors], structure)
    queries, keys, _ = reference.project_tables(exact)
    value_keys, _ = reference.project_values(exact, cells.values)
    zero_key, _ = reference.project_values(exact, torch.zeros_like(cells.values[:1]))
    return (
        torch.einsum("phd,nhd->nhp", queries, keys[cells.genes.long()]),
        torch.einsum("phd,nhd->nhp", queries, value_keys - zero_key),
    )


# --- lengths and duplicates --------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 300, 5000, 70_000])
@pytest.mark.parametrize("bins", [None, 6])
def test_one_gene_again_and_again(
    random_weights: MakeWeights,
    compare: Compare,
    length: int,
    bins: int | None,
    interpreted: bool,
) -> None:
    if interpreted and length > 300:
        pytest.skip("takes the interpreter too long: test_gpu_encoder has longer cells")
    cells = RaggedCells(
        torch.tensor([0, length]),
        torch.full((length,), 7, dtype=torch.int32),
        torch.full((length,), 3, dtype=torch.uint8),
    )
    compare(random_weights(bins=bins), cells)


@pytest.mark.parametrize("length", [300, 20_000, 70_000])
def test_as_many_genes_as_a_cell_can_have(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    length: int,
    interpreted: bool,
) -> None:
    """Each gene of the largest vocabulary once, at the paper's head_dim, with attention."""
    if interpreted and length > 300:
        pytest.skip("takes the interpreter too long: test_gpu_encoder has longer cells")
    weights = random_weights(head_dim=16, genes=70_000)
    cells = random_cells([3, length], genes=70_000)
    genes = torch.randperm(70_000, generator=torch.Generator().manual_seed(1))[:length]
    cells.genes[3:] = genes.int()
    compare(weights, cells, attention=True)


# --- ranges of scores --------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["integers", "continuous", "binned"])
def test_scores_to_200_of_genes_and_values(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, values: str
) -> None:
    bins = 6 if values == "binned" else None
    weights = random_weights(bins=bins, gene_scores=200.0, value_scores=200.0)
    cells = random_cells([97, 11, 61, 1, 5], bins=None if values == "continuous" else 6)
    for part in score_parts(weights, cells):
        assert 150 < part.abs().max() <= 200.01
        assert part.min() < -100
        assert part.max() > 100
    compare(weights, cells, attention=True)
    compare(weights, cells, torch.tensor([0, 3000, 1, 2, 0]), attention=True)


@pytest.mark.parametrize("bins", [None, 6])
def test_a_cell_far_below_the_highest_scores(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, bins: int | None
) -> None:
    """Every patch of the cell underflows relative to the best genes, which it does not have."""
    weights = random_weights(bins=bins, value_scores=2.0)
    weights.genes[1:] *= 0.01
    weights.genes[90:] *= 1_000_000  # in all directions: each patch scores high for some of them
    cells = random_cells([41, 1, 67], genes=80, bins=6 if bins else None)
    cells.genes.clamp_(min=1)
    everything = RaggedCells(
        torch.tensor([0, 101]), torch.arange(101), torch.zeros(101, dtype=torch.uint8)
    )
    highest = score_parts(weights, everything)[0].amax(0)
    assert (highest > 2 * UNDERFLOW).all()
    gene_part, value_part = score_parts(weights, cells)
    assert (highest - gene_part.amax(0) - value_part.abs().amax(0) > UNDERFLOW).all()
    compare(weights, cells, attention=True)


@pytest.mark.parametrize("values", ["integers", "continuous", "binned"])
def test_some_patches_of_a_cell_underflow(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, values: str
) -> None:
    bins = 6 if values == "binned" else None
    weights = random_weights(bins=bins, gene_scores=200.0, value_scores=1.0)
    cells = random_cells([29, 3, 1], bins=None if values == "continuous" else 6)
    everything = RaggedCells(
        torch.tensor([0, 101]), torch.arange(101), torch.zeros(101, dtype=torch.uint8)
    )
    highest = score_parts(weights, everything)[0].amax(0)
    below = highest - score_parts(weights, cells.slice(2, 3))[0].amax(0)  # [h, p] of the last cell
    assert 0 < (below > UNDERFLOW + 10).sum() < below.numel()
    assert (below < UNDERFLOW - 10).any()
    compare(weights, cells, attention=True)
    compare(weights, cells, torch.tensor([1, 0, 2]), attention=True)


def test_values_that_take_scores_out_of_range(
    random_weights: MakeWeights, compare: Compare
) -> None:
    """Negative, zero and large float32 values: the value part of scores reaches thousands."""
    weights = random_weights(value_scores=10.0)
    values = torch.tensor([-1000.0, 0, 1000, 3.7, -0.0, -5, -6, -7, 1e-30, 500, 500.25, 1e-42])
    genes = torch.arange(len(values), dtype=torch.int32)
    cells = RaggedCells(torch.tensor([0, 4, 8, 12]), genes, values)
    parts = score_parts(weights, cells)[1]
    assert parts.max() > 1000
    assert parts.min() < -1000
    compare(weights, cells, attention=True)


@pytest.mark.parametrize("largest", [1e6, 1e10])
def test_values_of_millions_and_more(
    random_weights: MakeWeights, compare: Compare, largest: float
) -> None:
    """Scores of millions and more: one entry gets all the attention."""
    weights = random_weights(value_scores=10.0)
    values = largest * torch.tensor([1, 0.99, 0.5, 1e-3, 0, 0.9, 0.3])
    cells = RaggedCells(torch.tensor([0, 3, 7]), torch.arange(7, dtype=torch.int32), values)
    compare(weights, cells, attention=True)


def test_integers_to_255(random_weights: MakeWeights, compare: Compare) -> None:
    weights = random_weights(value_scores=200.0, highest_value=255)
    values = torch.tensor([255, 0, 1, 254, 7, 128, 127], dtype=torch.uint8)
    cells = RaggedCells(torch.tensor([0, 3, 7]), torch.arange(7, dtype=torch.int32), values)
    compare(weights, cells, attention=True)


def test_large_value_rows(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare
) -> None:
    weights = random_weights()
    weights.cross.in_weight[:10] = 0  # all entries weigh the same
    weights.cross.in_weight[20:] *= 1e8
    compare(weights, random_cells([700]))


# --- shapes, pads and weights ------------------------------------------------------------------


@pytest.mark.parametrize("bins", [None, 6])
@pytest.mark.parametrize(
    "dimensions",
    [
        pytest.param({"head_dim": 16, "patches": 64}, id="paper"),
        pytest.param({"head_dim": 20, "patches": 37}, id="more_than_a_vector"),
        pytest.param({"head_dim": 1, "patches": 1, "heads": 1}, id="smallest"),
        pytest.param({"head_dim": 15, "heads": 3}, id="with_total_a_vector"),
        pytest.param({"head_dim": 17, "heads": 5, "patches": 16}, id="just_beyond_a_vector"),
        pytest.param({"head_dim": 5, "heads": 7, "patches": 83}, id="many_heads"),
    ],
)
def test_any_dimensions(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    dimensions: dict[str, int],
    bins: int | None,
) -> None:
    weights = random_weights(**dimensions, bins=bins)
    pads = torch.tensor([0, 2, 0, 7, 1])
    compare(weights, random_cells([61, 0, 0, 1, 35]), pads, attention=True)


@pytest.mark.parametrize("bins", [None, 6])
@pytest.mark.parametrize("pads", [1, 3000, 2**20])
def test_pads_are_so_many_entries_of_gene_0(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    bins: int | None,
    pads: int,
) -> None:
    weights, cells = random_weights(bins=bins), random_cells([23, 0, 1], bins=6)
    compare(weights, cells, torch.full((3,), pads), attention=True)


@pytest.mark.parametrize("scores", [None, 200.0])
def test_attention_weights_sum_to_one(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    run: Run,
    backend: str,
    scores: float | None,
) -> None:
    weights = random_weights(gene_scores=scores, value_scores=scores, self_blocks=2)
    lengths, pads = [61, 0, 0, 1, 500], torch.tensor([0, 2, 0, 7, 1])
    cells = random_cells(lengths)
    encoded = run(weights, cells, pads, attention=True)
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    parts = encoded.cross_attention.split(lengths)
    totals = torch.stack([part.double().sum(0) for part in parts]) + encoded.pad_attention
    assert (encoded.cross_attention >= 0).all()
    assert (encoded.pad_attention[pads == 0] == 0).all()
    attends = (torch.tensor(lengths) + pads > 0).double()[:, None, None]
    tolerance = 1e-6 if backend == "numba" else 1e-5
    torch.testing.assert_close(totals, attends.expand_as(totals), rtol=0, atol=tolerance)
    for block in encoded.self_attention or ():
        torch.testing.assert_close(block.sum(-1), torch.ones(block.shape[:-1]), rtol=0, atol=1e-6)
    assert len(encoded.self_attention or ()) == 2


@pytest.mark.parametrize("attention", [False, True])
def test_what_cannot_be_computed_is_not_hidden(
    random_weights: MakeWeights, random_cells: MakeCells, run: Run, attention: bool
) -> None:
    """A value that is not a number gives features that are none, in its own cell only."""
    weights, cells = random_weights(), random_cells([9, 40, 9], bins=None)
    right, found = (
        run(weights, RaggedCells(cells.offsets, cells.genes, values), attention=attention).features
        for values in (cells.values, cells.values.where(torch.arange(58) != 20, math.nan))
    )
    assert found[1].isnan().all()
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[2], right[2])
