"""Empty cells stay in place, kinds of tensors do not matter: what any fast backend promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, patch_attention, reference
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from .conftest import TOLERANCE, move

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
AsType = Callable[[EncoderWeights, torch.dtype], EncoderWeights]
Errors = Callable[[Tensor, Tensor], Tensor]
Parts = Callable[[Encoded], list[Tensor]]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]

LENGTHS = [17, 0, 40]


# --- a cell's result depends on that cell alone, bit for bit -----------------------------------


@pytest.fixture(scope="module", params=["integers", "continuous", "binned"])
def sample(
    request: pytest.FixtureRequest, random_weights: MakeWeights, random_cells: MakeCells
) -> tuple[EncoderWeights, RaggedCells, Tensor]:
    """Weights with scores to 120, cells of very different lengths, and pads."""
    kind = request.param
    bins = 6 if kind == "binned" else None
    weights = random_weights(
        bins=bins, gene_scores=120.0, value_scores=20.0, self_blocks=int(kind == "integers")
    )
    cells = random_cells([3, 0, 70, 33], bins=None if kind == "continuous" else 6)
    return weights, cells, torch.tensor([0, 2, 7, 0])


Sample = tuple[EncoderWeights, RaggedCells, Tensor]


def alone(sample: Sample, run: Run, **options: Any) -> list[Encoded]:
    """The result of each cell in a batch of its own."""
    weights, cells, pads = sample
    return [
        run(weights, cells.slice(i, i + 1), pads[i : i + 1], **options) for i in range(len(cells))
    ]


def test_alone_and_in_a_batch(sample: Sample, run: Run) -> None:
    together = torch.cat([one.features for one in alone(sample, run)])
    assert torch.equal(together, run(*sample).features)


def test_attention_weights_alone_and_in_a_batch(
    sample: Sample, run: Run, all_parts: Parts, backend: str, cell_errors: Errors
) -> None:
    """The same bits, features included; but Triton's weights of self-attention are PyTorch's.

    Those are within 1e-5 of the exact ones either way, so within twice that of each other.
    """
    whole = run(*sample, attention=True)
    assert torch.equal(whole.features, run(*sample).features)
    each = [all_parts(one) for one in alone(sample, run, attention=True)]
    for part, (expected, *found) in enumerate(zip(all_parts(whole), *each, strict=True)):
        if backend == "triton" and part >= 3:
            assert cell_errors(torch.cat(found), expected).max() <= 2 * TOLERANCE
        else:
            assert torch.equal(torch.cat(found), expected)


def test_the_cross_attention_alone_and_in_a_batch(
    sample: Sample, backend: str, device: torch.device
) -> None:
    weights, cells, pads = sample

    def attend(first: int, last: int) -> tuple[Tensor, Tensor]:
        some = cells.slice(first, last).to(device)
        return patch_attention(
            move(weights, device), some.offsets, some.genes, some.values,
            pads=pads[first:last].to(device), backend=backend,
        )  # fmt: skip

    each = [attend(i, i + 1) for i in range(len(cells))]
    for whole, *parts in zip(attend(0, len(cells)), *each, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_in_any_order(sample: Sample, run: Run) -> None:
    weights, cells, pads = sample
    order = torch.tensor([3, 2, 0, 2])  # one is left out, one is there twice
    expected = run(weights, cells, pads).features[order]
    assert torch.equal(run(weights, cells.take(order), pads[order]).features, expected)


def test_no_pads_are_zero_pads(sample: Sample, run: Run) -> None:
    weights, cells, _ = sample
    none = run(weights, cells, torch.zeros(len(cells), dtype=torch.int64)).features
    assert torch.equal(run(weights, cells).features, none)


# --- an empty cell attends to nothing ----------------------------------------------------------


@pytest.mark.parametrize("attention", [False, True])
def test_empty_cells_stay_in_their_place(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    as_type: AsType,
    cell_errors: Errors,
    run: Run,
    attention: bool,
) -> None:
    """Wherever they are, their features are those of an attended value of 0."""
    weights = random_weights()
    lengths = [0, 0, 3, 0, 17, 0]
    cells = random_cells(lengths)
    features = run(weights, cells, attention=attention).features
    exact = as_type(weights, torch.float64)
    nothing = torch.zeros(1, 13, 10, dtype=torch.float64)
    x = reference.finish_block(exact.cross, exact.patches, nothing)
    attended, _ = reference._self_attention(exact.self_blocks[0], x, 2, 0.0)
    x = reference.finish_block(exact.self_blocks[0], x, attended)
    assert exact.projection_weight is not None
    assert exact.projection_bias is not None
    x = x @ exact.projection_weight.T + exact.projection_bias
    empty = torch.tensor(lengths) == 0
    assert cell_errors(features[empty], x.expand(4, -1, -1)).max() <= 1e-5
    assert (features[~empty] != features[0]).any(dim=2).all()


@pytest.mark.parametrize("count", [0, 1, 200])
def test_batches_without_any_entry(
    random_weights: MakeWeights, run: Run, all_parts: Parts, interpreted: bool, count: int
) -> None:
    count = min(count, 3) if interpreted else count
    weights = random_weights(self_blocks=2)
    none = torch.zeros(0, dtype=torch.int32)
    cells = RaggedCells(torch.zeros(count + 1, dtype=torch.int64), none, none.to(torch.uint8))
    encoded = run(weights, cells, attention=True)
    assert [tuple(part.shape) for part in all_parts(encoded)] == [
        (count, 13, 3), (0, 2, 13), (count, 2, 13), (count, 2, 13, 13), (count, 2, 13, 13),
    ]  # fmt: skip
    assert encoded.features.isfinite().all()
    assert (encoded.features == encoded.features[:1]).all()
    assert encoded.pad_attention is not None
    assert (encoded.pad_attention == 0).all()
    features = run(weights, cells).features
    torch.testing.assert_close(features, encoded.features, rtol=0, atol=1e-5)
    assert (features == features[:1]).all()


# --- kinds of tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("genes", [torch.uint16, torch.uint32, torch.int32, torch.int64])
def test_integer_types_do_not_matter(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    run: Run,
    genes: torch.dtype,
    offsets: torch.dtype,
) -> None:
    weights, cells = random_weights(), random_cells([17, 0])
    expected = run(weights, cells).features
    variant = RaggedCells(cells.offsets.to(offsets), cells.genes.to(genes), cells.values)
    assert torch.equal(run(weights, variant).features, expected)


def test_tensors_with_gaps_between_their_elements(
    random_weights: MakeWeights, random_cells: MakeCells, run: Run
) -> None:
    def with_gaps(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor.flip(0)], 1)[:, 0]

    weights, cells = random_weights(), random_cells(LENGTHS)
    pads = torch.tensor([3, 0, 5])
    variant = RaggedCells(*map(with_gaps, (cells.offsets, cells.genes, cells.values)))
    assert not variant.genes.is_contiguous()
    expected = run(weights, cells, pads).features
    assert torch.equal(run(weights, variant, with_gaps(pads)).features, expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_types_of_values(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, dtype: torch.dtype
) -> None:
    weights = random_weights(value_scores=10.0)
    cells = random_cells(LENGTHS, bins=6 if dtype == torch.uint8 else None, dtype=dtype)
    compare(weights, cells, attention=True)


def test_integers_equal_the_same_numbers_as_floats(
    random_weights: MakeWeights, random_cells: MakeCells, run: Run
) -> None:
    weights, cells = random_weights(), random_cells(LENGTHS)
    floats = RaggedCells(cells.offsets, cells.genes, cells.values.float())
    assert torch.equal(run(weights, cells).features, run(weights, floats).features)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_types(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    interpreted: bool,
    dtype: torch.dtype,
) -> None:
    weights, cells = random_weights(dtype=dtype), random_cells(LENGTHS)
    if interpreted and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="interpreter computes bfloat16 products wrongly"):
            compare(weights, cells)
        return
    compare(weights, cells)
    compare(weights, cells, attention=True)


@pytest.mark.parametrize("projection", [3, None])
def test_mean_over_the_patches(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, projection: int | None
) -> None:
    compare(random_weights(projection=projection), random_cells(LENGTHS), mean=True)
    compare(random_weights(projection=projection), random_cells(LENGTHS), mean=True, attention=True)
