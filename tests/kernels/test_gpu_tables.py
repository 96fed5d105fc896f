"""What the Triton kernels read: projected tables, in range by powers of two, scores bounded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, reference
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from .conftest import convert

tables = pytest.importorskip("cellpatch_fast.kernels.gpu.tables")

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Compare = Callable[..., Encoded]

TYPES = [torch.float32, torch.float16, torch.bfloat16]
PRECISION = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(scope="module")
def backend(triton_backend: None) -> str:
    return "triton"


def near(found: Tensor, exact: Tensor, precision: float) -> bool:
    """Within ``precision`` of the largest number."""
    return bool((found.double() - exact).abs().max() <= precision * exact.abs().max())


def is_power_of_two(number: Tensor) -> bool:
    return bool((torch.frexp(number).mantissa == 0.5).all())


@each_type
@pytest.mark.parametrize("bins", [None, 6])
def test_rows_are_the_projected_tables(
    random_weights: MakeWeights, dtype: torch.dtype, bins: int | None
) -> None:
    """Values as they are, keys by the scores that queries get of them; padding is 0."""
    weights = random_weights(bins=bins)
    made = tables.make_tables(weights, dtype)
    queries, keys, values = reference.project_tables(convert(weights, torch.float64))
    rows = made.rows.double().sum(-2)  # [g, h, 2, d] of terms
    assert made.rows.dtype == (torch.float16 if dtype == torch.float32 else dtype)
    assert rows.shape == (101, 2, 2, 16)
    assert (rows[..., 5:] == 0).all()
    unscaled = rows[:, :, 1, :5] * made.row_unscale[:, None]
    assert near(unscaled, values, PRECISION[dtype])
    query = made.query.double().sum(0)  # [h, p, d]
    assert query.shape == (2, 16, 16)
    assert (query[:, 13:] == 0).all()
    scores = torch.einsum("hpd,ghd->ghp", query, rows[:, :, 0])[..., :13]
    exact = torch.einsum("phd,ghd->ghp", queries, keys) / math.log(2)
    assert near(scores, exact, 4 * PRECISION[dtype])
    assert is_power_of_two(made.row_unscale)
    assert is_power_of_two(made.unscale)


@each_type
@pytest.mark.parametrize("bins", [None, 6])
@pytest.mark.parametrize("scores", [1e-3, 1.0, 200.0])
def test_no_score_is_beyond_its_bounds(
    random_weights: MakeWeights, dtype: torch.dtype, bins: int | None, scores: float
) -> None:
    made = tables.make_tables(random_weights(bins=bins, gene_scores=scores), dtype)
    query, rows = made.query.float().sum(0), made.rows.float().sum(-2)
    found = torch.einsum("hpd,ghd->ghp", query, rows[:, :, 0])
    if bins:
        parts = torch.einsum("hpd,bhd->bhp", query, made.bin_rows.float().sum(-2)[:, :, 0])
        found = (found[:, None] + parts).flatten(0, 1)
    slack = 1e-5 * found.abs().max()
    assert (found <= made.highest + slack).all()
    assert (found >= made.lowest - slack).all()
    assert (made.slope == 0).all() == bool(bins)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("bins", [None, 6])
def test_embeddings_of_any_magnitude(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    bins: int | None,
    factor: float,
) -> None:
    """float16 ends at 65,504 and loses digits below 6e-5."""
    weights = random_weights(bins=bins, self_blocks=0)
    for tensor in (weights.genes, weights.value_weight, weights.value_bias, weights.value_bins):
        if tensor is not None:
            tensor *= factor
    weights.cross.in_weight[:10] /= factor  # scores stay as they were
    weights.cross.in_bias[:10] /= factor
    compare(weights, random_cells([41, 1]))


@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_values_of_any_magnitude(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, factor: float
) -> None:
    weights = random_weights(self_blocks=0)
    weights.cross.in_weight[20:] *= factor
    weights.cross.in_bias[20:] *= factor
    weights.cross.out_weight.div_(factor)
    compare(weights, random_cells([41, 1]))


@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_matrices_of_any_magnitude(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, factor: float
) -> None:
    """Each alone, so that it is far from the others: they share one power of two."""
    cells = random_cells([7])
    for name in ("out_weight", "up_weight", "down_weight"):
        weights = random_weights(self_blocks=0)
        getattr(weights.cross, name).mul_(factor)
        compare(weights, cells)
    weights = random_weights(self_blocks=0)
    assert weights.projection_weight is not None
    weights.projection_weight.mul_(factor)
    compare(weights, cells)


@pytest.mark.parametrize("part", ["genes", "patches", "value_weight"])
def test_weights_of_zero(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, part: str
) -> None:
    weights = random_weights(self_blocks=0)
    getattr(weights, part).zero_()
    compare(weights, random_cells([41, 0, 1]), torch.tensor([0, 1, 2]))


def test_positions_beyond_32_bits_are_refused(random_weights: MakeWeights) -> None:
    weights = random_weights()
    genes = weights.genes[:1].expand(1 << 25, -1)
    with pytest.raises(ValueError, match=r"33554432 genes with 2 heads of 5 is too large"):
        tables.make_tables(weights._replace(genes=genes), torch.float32)
