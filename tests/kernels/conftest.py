"""Random weights and cells for the tests of the kernels, and how errors are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from cellpatch_fast.kernels import BlockWeights, Encoded, EncoderWeights, encode, reference
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

TOLERANCE = 1e-5  # promised: the relative error of a cell against float64
GENES = 101  # tokens that random weights and cells have unless told otherwise


def make_weights(
    seed: int = 0,
    *,
    heads: int = 2,
    head_dim: int = 5,
    patches: int = 13,
    genes: int = GENES,
    mlp_dim: int = 17,
    bins: int | None = None,
    projection: int | None = 3,
    self_blocks: int = 1,
    gene_scores: float | None = None,
    value_scores: float | None = None,
    highest_value: float = 5,
    dtype: torch.dtype = torch.float32,
) -> EncoderWeights:
    """Random weights; every dimension has its own prime, so that a swapped axis fails.

    ``gene_scores`` is what the largest gene part of a score shall be, ``value_scores`` the same
    of the value part, where ``highest_value`` is the largest value of an affine embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = heads * head_dim

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def block() -> BlockWeights:
        width = dim**-0.5
        return BlockWeights(
            normal(3 * dim, dim, scale=width),
            normal(3 * dim, scale=0.1),
            normal(dim, dim, scale=width),
            normal(dim, scale=0.1),
            1 + normal(dim, scale=0.1),
            normal(dim, scale=0.1),
            normal(mlp_dim, dim, scale=width),
            normal(mlp_dim, scale=0.1),
            normal(dim, mlp_dim, scale=mlp_dim**-0.5),
            normal(dim, scale=0.1),
            1 + normal(dim, scale=0.1),
            normal(dim, scale=0.1),
        )

    weights = EncoderWeights(
        heads,
        normal(genes, dim),
        normal(patches, dim),
        block(),
        tuple(block() for _ in range(self_blocks)),
        normal(dim) if bins is None else None,
        normal(dim) if bins is None else None,
        None if bins is None else normal(bins, dim),
        None if projection is None else normal(projection, dim),
        None if projection is None else normal(projection),
    )
    queries, keys, _ = reference.project_tables(weights)
    if gene_scores is not None:
        factor = gene_scores / torch.einsum("phd,ghd->ghp", queries, keys).abs().max()
        weights.cross.in_weight[:dim] *= factor
        weights.cross.in_bias[:dim] *= factor
        queries = queries * factor
    if value_scores is not None:
        levels = torch.tensor([0, highest_value]) if bins is None else torch.arange(bins)
        parts, _ = reference.project_values(weights, levels)
        parts = torch.einsum("phd,nhd->nhp", queries, parts - parts[:1])
        factor = value_scores / parts.abs().max()
        for tensor in (weights.value_weight, weights.value_bins):
            if tensor is not None:
                tensor *= factor
    return convert(weights, dtype)


def convert(weights: EncoderWeights, dtype: torch.dtype) -> EncoderWeights:
    tensors, structure = weights.flatten()
    return EncoderWeights.unflatten([tensor.to(dtype) for tensor in tensors], structure)


def make_cells(
    lengths: Sequence[int],
    *,
    genes: int = GENES,
    bins: int | None = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RaggedCells:
    """Cells of random genes: uint8 values below ``bins``, or values of ``dtype`` if it is None."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    entries = int(offsets[-1])
    tokens = torch.randint(0, genes, (entries,), generator=generator, dtype=torch.int32)
    if bins is None:
        values = 5 * torch.rand(entries, generator=generator)
        return RaggedCells(offsets, tokens, values.to(dtype))
    values = torch.randint(0, bins, (entries,), generator=generator)
    return RaggedCells(offsets, tokens, values.to(torch.uint8))


def errors_per_cell(found: Tensor, expected: Tensor) -> Tensor:
    """‖found - expected‖ / ‖expected‖ of each cell, [cells], in float64."""
    assert found.shape == expected.shape
    expected = expected.double().flatten(1)
    return (found.double().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)


def assert_close(found: Tensor, expected: Tensor | None) -> None:
    assert expected is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE, atol=1e-7)


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., EncoderWeights]:
    return make_weights


@pytest.fixture(scope="session")
def random_cells() -> Callable[..., RaggedCells]:
    return make_cells


@pytest.fixture(scope="session")
def as_type() -> Callable[[EncoderWeights, torch.dtype], EncoderWeights]:
    return convert


@pytest.fixture(scope="session")
def cell_errors() -> Callable[[Tensor, Tensor], Tensor]:
    return errors_per_cell


@pytest.fixture(scope="session")
def compare() -> Callable[..., Encoded]:
    """Encodes with Numba, asserts that features equal the reference's, and returns them."""

    def check(
        weights: EncoderWeights,
        cells: RaggedCells,
        pads: Tensor | None = None,
        attention: bool = False,
    ) -> Encoded:
        with torch.no_grad():
            found = encode(
                weights, cells.offsets, cells.genes, cells.values,
                pads=pads, attention=attention, backend="numba",
            )  # fmt: skip
            values = cells.values
            expected = reference.encode(
                convert(weights, torch.float64), cells.offsets, cells.genes,
                values.double() if values.is_floating_point() else values,
                pads=pads, attention=attention,
            )  # fmt: skip
        assert found.features.dtype == torch.float32
        assert errors_per_cell(found.features, expected.features).max() <= TOLERANCE
        if attention:
            assert found.cross_attention is not None
            assert found.pad_attention is not None
            assert found.self_attention is not None
            assert_close(found.cross_attention, expected.cross_attention)
            assert_close(found.pad_attention, expected.pad_attention)
            for block, right in zip(
                found.self_attention, expected.self_attention or (), strict=True
            ):
                assert_close(block, right)
        return found

    return check


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
