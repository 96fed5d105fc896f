"""A cell's bits depend on that cell and the current weights alone; empty cells stay in place."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, encode, reference
from cellpatch_fast.kernels.cpu import encoder
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
AsType = Callable[[EncoderWeights, torch.dtype], EncoderWeights]
Errors = Callable[[Tensor, Tensor], Tensor]
Compare = Callable[..., Encoded]

KINDS = ["integers", "continuous", "binned"]


def run(
    weights: EncoderWeights,
    cells: RaggedCells,
    pads: Tensor | None = None,
    attention: bool = False,
) -> Encoded:
    with torch.no_grad():
        return encode(
            weights, cells.offsets, cells.genes, cells.values,
            pads=pads, attention=attention, backend="numba",
        )  # fmt: skip


def parts(encoded: Encoded) -> list[Tensor]:
    """All tensors of a result."""
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    return [
        encoded.features,
        encoded.cross_attention,
        encoded.pad_attention,
        *(encoded.self_attention or ()),
    ]


@pytest.fixture(scope="module", params=KINDS)
def sample(
    request: pytest.FixtureRequest, random_weights: MakeWeights, random_cells: MakeCells
) -> tuple[EncoderWeights, RaggedCells, Tensor]:
    """Weights, 1,100 cells of very different lengths, and pads.

    Scores reach 120, so that some patches of some cells are computed again in float64. The
    entries of the long cells are in the order of their tokens in every other one.
    """
    kind = request.param
    bins = 6 if kind == "binned" else None
    weights = random_weights(bins=bins, gene_scores=120.0, value_scores=20.0)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 40, (1100,), generator=generator)
    lengths[::10] = 0
    lengths[200:240] = torch.randint(100, 1500, (40,), generator=generator)
    cells = random_cells(lengths.tolist(), bins=None if kind == "continuous" else 6)
    for cell in range(200, 240, 2):
        first, last = cells.offsets[cell : cell + 2]
        cells.genes[first:last] = cells.genes[first:last].sort().values
    return weights, cells, torch.randint(0, 3, (1100,), generator=generator)


Sample = tuple[EncoderWeights, RaggedCells, Tensor]


# --- a cell's result depends on that cell alone, bit for bit -----------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_batches_of_any_size_give_the_same_bits(sample: Sample, size: int, threads: int) -> None:
    weights, cells, pads = sample
    whole = parts(run(weights, cells, pads, attention=True))
    starts = range(0, len(cells), size)
    batches = [
        parts(run(weights, cells.slice(i, i + size), pads[i : i + size], attention=True))
        for i in starts
    ]
    for expected, *found in zip(whole, *batches, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_any_order_gives_the_same_bits(sample: Sample, threads: int) -> None:
    weights, cells, pads = sample
    whole = run(weights, cells, pads).features
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(weights, cells.take(order), pads[order]).features, whole[order])


def test_one_and_two_threads_give_the_same_bits(sample: Sample, two_threads: None) -> None:
    weights, cells, pads = sample
    two = run(weights, cells, pads).features
    torch.set_num_threads(1)
    assert torch.equal(run(weights, cells, pads).features, two)


def test_features_do_not_depend_on_attention_being_kept(sample: Sample) -> None:
    weights, cells, pads = sample
    with_attention = run(weights, cells, pads, attention=True).features
    assert torch.equal(run(weights, cells, pads).features, with_attention)


def test_no_pads_are_zero_pads(sample: Sample) -> None:
    weights, cells, _ = sample
    none = run(weights, cells, torch.zeros(len(cells), dtype=torch.int64)).features
    assert torch.equal(run(weights, cells).features, none)


def test_new_tables_are_the_old_ones(sample: Sample, threads: int) -> None:
    """Making the tables again, on any number of threads, gives the same bits."""
    weights, cells, pads = sample
    before = run(weights, cells, pads).features
    encoder.kept.forget()
    assert torch.equal(run(weights, cells, pads).features, before)


def test_two_callers_at_once_get_the_same_bits(sample: Sample, two_threads: None) -> None:
    weights, cells, pads = sample
    expected = run(weights, cells, pads).features
    found: list[Tensor] = []

    def call() -> None:
        found.extend(run(weights, cells, pads).features for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 10
    assert all(torch.equal(features, expected) for features in found)


# --- nor on what memory held before ------------------------------------------------------------


class Garbage:
    """NumPy, except that new arrays are full of NaN where their content is promised to nobody."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: int, dtype: type) -> np.ndarray:
        return np.full(shape, np.nan, dtype)


@pytest.mark.parametrize("content", [np.nan, 3e38])
def test_what_memory_held_before_does_not_matter(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, content: float
) -> None:
    weights, cells, pads = sample
    expected = parts(run(weights, cells, pads, attention=True))
    filled = []

    def used(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_used(sizes: Any) -> Any:
            scratch = make(sizes)
            for array in scratch:
                if array.dtype.kind == "f":
                    array.fill(content)
                    filled.append(array)
            return scratch

        return make_used

    for name in ("make_scratch", "make_block_scratch"):
        monkeypatch.setattr(encoder, name, used(getattr(encoder, name)))
    monkeypatch.setattr(encoder, "np", Garbage())
    found = parts(run(weights, cells, pads, attention=True))
    assert filled
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("bins", [None, 6])
def test_neighbours_that_are_not_numbers_do_not_matter(
    random_weights: MakeWeights, random_cells: MakeCells, bins: int | None, poison: float
) -> None:
    """Not even one whose features overflow, computed just before in the same scratch memory."""
    weights = random_weights(bins=bins)
    weights.genes[100] = poison
    cells = random_cells([33, 5, 0, 40, 12], genes=100, bins=bins)
    cells.genes[33:38] = 100  # the second cell
    if bins is None:
        cells.values[33:38] = poison
    together = run(weights, cells).features
    alone = [run(weights, cells.slice(i, i + 1)).features for i in range(5)]
    if not np.isfinite(poison):  # 1e38 itself can be normalised away
        assert not together[1].isfinite().any()
    others = torch.tensor([0, 2, 3, 4])
    assert together[others].isfinite().all()
    assert torch.equal(together[others], torch.cat(alone)[others])


# --- an empty cell attends to nothing ----------------------------------------------------------


def test_empty_cells_stay_in_their_place(
    random_weights: MakeWeights, random_cells: MakeCells, as_type: AsType, cell_errors: Errors
) -> None:
    """Wherever they are, their features are those of an attended value of 0."""
    weights = random_weights()
    lengths = [0, 0, 3, 0, 17, 0]
    cells = random_cells(lengths)
    features = run(weights, cells, attention=True).features
    exact = as_type(weights, torch.float64)
    nothing = torch.zeros(1, 13, 10, dtype=torch.float64)
    x = reference._finish_block(exact.cross, exact.patches, nothing)
    attended, _ = reference._self_attention(exact.self_blocks[0], x, 2, 0.0)
    x = reference._finish_block(exact.self_blocks[0], x, attended)
    assert exact.projection_weight is not None
    assert exact.projection_bias is not None
    x = x @ exact.projection_weight.T + exact.projection_bias
    empty = torch.tensor(lengths) == 0
    assert cell_errors(features[empty], x.expand(4, -1, -1)).max() <= 1e-5
    assert (features[~empty] != features[0]).any(dim=2).all()


@pytest.mark.parametrize("count", [0, 1, 200])
def test_batches_without_any_entry(random_weights: MakeWeights, count: int, threads: int) -> None:
    weights = random_weights(self_blocks=2)
    none = torch.zeros(0, dtype=torch.int32)
    cells = RaggedCells(torch.zeros(count + 1, dtype=torch.int64), none, none.to(torch.uint8))
    encoded = run(weights, cells, attention=True)
    assert [tuple(part.shape) for part in parts(encoded)] == [
        (count, 13, 3), (0, 2, 13), (count, 2, 13), (count, 2, 13, 13), (count, 2, 13, 13),
    ]  # fmt: skip
    assert encoded.features.isfinite().all()
    assert (encoded.features == encoded.features[:1]).all()
    assert encoded.pad_attention is not None
    assert (encoded.pad_attention == 0).all()


# --- kinds of tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("genes", [torch.uint16, torch.uint32, torch.int32, torch.int64])
def test_integer_types_do_not_matter(
    random_weights: MakeWeights, random_cells: MakeCells, genes: torch.dtype, offsets: torch.dtype
) -> None:
    weights, cells = random_weights(), random_cells([17, 0, 40])
    expected = encode(weights, cells.offsets, cells.genes, cells.values, backend="numba").features
    tokens = torch.stack([cells.genes, cells.genes]).T.contiguous().to(genes)
    for variant in (cells.genes.to(genes), tokens[:, 1]):  # also with gaps between elements
        found = encode(
            weights, cells.offsets.to(offsets), variant, cells.values, backend="numba"
        ).features
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_types_of_values(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, dtype: torch.dtype
) -> None:
    weights = random_weights(value_scores=10.0)
    cells = random_cells([17, 0, 40], bins=6 if dtype == torch.uint8 else None, dtype=dtype)
    compare(weights, cells, attention=True)


def test_integers_equal_the_same_numbers_as_floats(
    random_weights: MakeWeights, random_cells: MakeCells, cell_errors: Errors
) -> None:
    weights, cells = random_weights(), random_cells([17, 0, 40])
    features = [
        encode(weights, cells.offsets, cells.genes, values, backend="numba").features
        for values in (cells.values, cells.values.float())
    ]
    assert torch.equal(*features)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_types(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, dtype: torch.dtype
) -> None:
    compare(random_weights(dtype=dtype), random_cells([17, 0, 40]), attention=True)


# --- one compiled kernel -----------------------------------------------------------------------


def test_all_types_run_one_compiled_kernel(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    """Another signature would be another 25 s of compiling on first use."""
    values = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    genes = [torch.uint16, torch.uint32, torch.int32, torch.int64]
    for dtype, token, offset, bins in itertools.product(
        values, genes, [torch.int32, torch.int64], [None, 6]
    ):
        if bins and dtype != torch.uint8:
            continue
        cells = random_cells([3, 0, 2])
        cells = RaggedCells(cells.offsets.to(offset), cells.genes.to(token), cells.values.to(dtype))
        run(random_weights(bins=bins, projection=None if bins else 3), cells, attention=bool(bins))
    assert len(encoder._encode.signatures) == 1
