"""Random weights and cells for the tests of the kernels, and how errors are measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import (
    BlockWeights,
    Encoded,
    EncoderWeights,
    encode,
    reference,
    synchronize,
)
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


def attention_errors(found: Encoded, exact: Encoded, offsets: Tensor) -> list[float]:
    """The largest relative error of a cell's weights: of the cross-attention, of each block."""

    def all_weights(encoded: Encoded) -> list[list[Tensor]]:
        _, cross, pads, *blocks = parts(encoded)
        of_cells = cross.split(offsets.diff().tolist())
        of_all = [torch.cat([one, pad[None]]) for one, pad in zip(of_cells, pads, strict=True)]
        return [of_all, *(list(block) for block in blocks)]

    errors = []
    for ours, rights in zip(all_weights(found), all_weights(exact), strict=True):
        errors.append(0.0)
        for one, right in zip(ours, rights, strict=True):
            difference, norm = float((one.double() - right).norm()), float(right.double().norm())
            assert norm > 0 or difference == 0  # an empty cell's are 0
            errors[-1] = max(errors[-1], difference / (norm or 1))
    return errors


def move(weights: EncoderWeights, device: torch.device) -> EncoderWeights:
    tensors, structure = weights.flatten()
    return EncoderWeights.unflatten([tensor.to(device) for tensor in tensors], structure)


def parts(encoded: Encoded) -> list[Tensor]:
    """All tensors of a result with attention."""
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    assert encoded.self_attention is not None
    return [
        encoded.features, encoded.cross_attention, encoded.pad_attention, *encoded.self_attention
    ]  # fmt: skip


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that Triton's kernels get to write to is full of NaN."""
    from cellpatch_fast.kernels.gpu.encoder import _Launch

    def full(launch: Any, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=torch.float32, device=launch.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Launch, "_empty", full)
        yield


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
def to_device() -> Callable[[EncoderWeights, torch.device], EncoderWeights]:
    return move


@pytest.fixture(scope="session")
def cell_errors() -> Callable[[Tensor, Tensor], Tensor]:
    return errors_per_cell


@pytest.fixture(scope="session")
def all_parts() -> Callable[[Encoded], list[Tensor]]:
    return parts


@pytest.fixture(scope="module", params=["numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """A test that takes this, `run` or `compare` runs on every fast backend."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    return request.param


@pytest.fixture(scope="module")
def interpreted(backend: str, device: torch.device) -> bool:
    """Whether kernels take a tenth of a second for a cell and a second for 1,000 entries."""
    return backend == "triton" and device.type == "cpu"


@pytest.fixture(scope="module")
def run(backend: str, device: torch.device) -> Callable[..., Encoded]:
    """``run(weights, cells, pads=None, **options of encode)``: the result, on the CPU."""

    def call(
        weights: EncoderWeights, cells: RaggedCells, pads: Tensor | None = None, **options: Any
    ) -> Encoded:
        there = cells.to(device)
        with torch.no_grad(), poisoned() if backend == "triton" else contextlib.nullcontext():
            found = encode(
                move(weights, device), there.offsets, there.genes, there.values,
                pads=None if pads is None else pads.to(device), backend=backend, **options,
            )  # fmt: skip
        if device.type == "cuda":
            synchronize(device)
        features, cross, pad, blocks = found
        return Encoded(
            features.cpu(),
            None if cross is None else cross.cpu(),
            None if pad is None else pad.cpu(),
            None if blocks is None else tuple(block.cpu() for block in blocks),
        )

    return call


@pytest.fixture(scope="module")
def compare(backend: str, run: Callable[..., Encoded]) -> Callable[..., Encoded]:
    """Runs, asserts that the result is as near the exact one as promised, and returns it.

    That is 1e-5, and with the tables of Triton in half precision twice the error of PyTorch in
    that precision.
    """

    def check(
        weights: EncoderWeights,
        cells: RaggedCells,
        pads: Tensor | None = None,
        attention: bool = False,
        **options: Any,
    ) -> Encoded:
        found = run(weights, cells, pads, attention=attention, **options)
        values = cells.values
        batch = (
            cells.offsets, cells.genes, values.double() if values.is_floating_point() else values
        )  # fmt: skip
        options.update(pads=pads, attention=attention)
        with torch.no_grad():
            exact = reference.encode(convert(weights, torch.float64), *batch, **options)
            half = backend == "triton" and weights.patches.dtype.itemsize == 2
            rough = reference.encode(weights, *batch, **options) if half else None
        assert found.features.dtype == torch.float32
        errors = errors_per_cell(found.features, exact.features)
        if rough is None:
            assert (errors <= TOLERANCE).all(), errors
        else:
            assert errors.max() <= 2 * errors_per_cell(rough.features, exact.features).max()
        if attention and backend == "numba":  # every single one
            for one, right in zip(parts(found)[1:], parts(exact)[1:], strict=True):
                assert one.dtype == torch.float32
                torch.testing.assert_close(one.double(), right, rtol=TOLERANCE, atol=1e-7)
        elif attention:
            ours = attention_errors(found, exact, cells.offsets)
            limit = [TOLERANCE] * len(ours)
            if rough is not None:
                limit = [2 * error for error in attention_errors(rough, exact, cells.offsets)]
            assert all(error <= most for error, most in zip(ours, limit, strict=True)), ours
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
