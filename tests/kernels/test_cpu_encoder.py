"""The Numba backend: a cell's bits depend on that cell and the current weights alone.

And its result is right for any length, which takes more examples than `test_attention` has.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, encode
from cellpatch_fast.kernels.cpu import encoder
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from ..examples import examples

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Compare = Callable[..., Encoded]

KINDS = ["integers", "continuous", "binned"]


@pytest.fixture(scope="module")
def backend() -> str:
    return "numba"


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


# --- right for any length ----------------------------------------------------------------------


@examples(30)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=3),
    genes=st.sampled_from([50, 101]),  # most genes are there many times
    values=st.sampled_from(["integers", "continuous", "binned"]),
    pads=st.booleans(),
    scores=st.sampled_from([None, 20.0, 200.0]),
    in_order=st.booleans(),
    seed=st.integers(0, 1000),
)
@example([0], 50, "integers", False, None, False, 0)
@example([5000, 0, 1], 101, "binned", True, 200.0, False, 1)
@example([31, 32, 33], 101, "continuous", True, 200.0, True, 2)  # around a tile of entries
@example([700, 0, *range(30)] * 2, 101, "integers", True, 20.0, True, 3)  # more than a group
@example([700, 0, *range(30)] * 2, 101, "integers", True, 20.0, False, 3)
def test_any_lengths(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    lengths: list[int],
    genes: int,
    values: str,
    pads: bool,
    scores: float | None,
    in_order: bool,
    seed: int,
) -> None:
    """And any order of entries: their tokens ascend in most files."""
    bins = 6 if values == "binned" else None
    weights = random_weights(seed, bins=bins, gene_scores=scores, value_scores=scores)
    cells = random_cells(
        lengths, genes=genes, bins=None if values == "continuous" else 6, seed=seed
    )
    for cell in range(len(lengths) if in_order else 0):
        first, last = cells.offsets[cell : cell + 2]
        cells.genes[first:last] = cells.genes[first:last].sort().values
    number = torch.arange(len(lengths)) * 1000 if pads else None
    compare(weights, cells, number)


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
