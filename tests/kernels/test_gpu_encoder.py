"""The Triton backend: what its tiles, chunks and types of tables could get wrong.

Errors are at most 1e-5 with float32 tables, and at most twice those of PyTorch in the same type
with float16. `test_attention`, `test_blocks` and `test_encoder` have what all backends promise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, patch_attention, reference
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from ..examples import examples
from .conftest import convert, errors_per_cell, move, poisoned

encoder = pytest.importorskip("cellpatch_fast.kernels.gpu.encoder")

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]

ON_GPU = torch.cuda.is_available()
KINDS = ["integers", "continuous", "binned"]
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]

each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def backend(triton_backend: None) -> str:
    return "triton"


@pytest.fixture(scope="module")
def direct(device: torch.device) -> Run:
    """`gpu.encoder.encode`, whose options decide what `kernels.encode` leaves to it."""

    def call(
        weights: EncoderWeights, cells: RaggedCells, pads: Tensor | None = None, **options: Any
    ) -> Encoded:
        there = cells.to(device)
        with torch.no_grad(), poisoned():
            return encoder.encode(
                move(weights, device), there.offsets, there.genes, there.values,
                pads=None if pads is None else pads.to(device), **options,
            )  # fmt: skip

    return call


def bins_of(kind: str) -> dict[str, int | None]:
    """Options of weights and of cells for values of a kind."""
    return {"bins": 6 if kind == "binned" else None}


def values_of(kind: str) -> dict[str, int | None]:
    return {"bins": None if kind == "continuous" else 6}


# --- lengths around tiles and chunks -----------------------------------------------------------


@each_kind
@each_type
def test_cells_around_a_tile(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    kind: str,
    dtype: torch.dtype,
) -> None:
    weights = random_weights(self_blocks=0, dtype=dtype, **bins_of(kind))
    cells = random_cells([0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129], **values_of(kind))
    compare(weights, cells)


@each_kind
@each_type
def test_cells_around_a_chunk(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Of 1,024 entries, alone and in a split batch; genes are there ten times each."""
    weights = random_weights(self_blocks=0, dtype=dtype, **bins_of(kind))
    lengths = [1025] if kind != "integers" else [1023, 0, 1024, 2049]
    compare(weights, random_cells(lengths, **values_of(kind)), torch.arange(len(lengths)))


@examples(100 if ON_GPU else 6)
@given(
    lengths=st.lists(st.integers(0, 3000 if ON_GPU else 70), min_size=1, max_size=3),
    genes=st.sampled_from([1, 7, 101]),
    kind=st.sampled_from(KINDS),
    pads=st.booleans(),
    scores=st.sampled_from([None, 20.0, 150.0]),
    seed=st.integers(0, 1000),
)
@example([0], 101, "integers", False, None, 0)
@example([0, 1], 1, "binned", True, 150.0, 1)
def test_any_lengths(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    lengths: list[int],
    genes: int,
    kind: str,
    pads: bool,
    scores: float | None,
    seed: int,
) -> None:
    weights = random_weights(
        seed, self_blocks=0, gene_scores=scores, value_scores=scores, **bins_of(kind)
    )
    cells = random_cells(lengths, genes=genes, seed=seed, **values_of(kind))
    compare(weights, cells, torch.arange(len(lengths)) * 1000 if pads else None)


def test_the_largest_vocabulary(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare
) -> None:
    weights = random_weights(head_dim=16, genes=70_000, self_blocks=0)
    cells = random_cells([129, 3], genes=70_000)
    cells.genes[0] = 69_999
    assert cells.genes.max() > 2**16
    compare(weights, cells)


# --- scores and values -------------------------------------------------------------------------


@each_kind
@each_type
def test_scores_beyond_a_hundred(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Too wide a range to know the highest score in advance: it is looked for first."""
    weights = random_weights(
        self_blocks=0, dtype=dtype, gene_scores=150.0, value_scores=150.0, **bins_of(kind)
    )
    compare(weights, random_cells([150, 0, 1, 7], **values_of(kind)), torch.tensor([0, 0, 2, 9]))


HUGE = torch.tensor([1e5, 0, 99_999, 3.25, 65_504, 0, 0, -1e5, 0.1])  # beyond float16


def test_huge_values_and_zeros(random_weights: MakeWeights, compare: Compare) -> None:
    weights = random_weights(self_blocks=0, value_scores=1.0, highest_value=1e5)
    cells = RaggedCells(torch.tensor([0, 5, 7, 9]), torch.arange(9, dtype=torch.int32), HUGE)
    compare(weights, cells)


def test_huge_values_with_tables_of_float16(random_weights: MakeWeights, direct: Run) -> None:
    """PyTorch's error, twice of which is promised, is that of values and slopes it can hold."""
    weights = random_weights(self_blocks=0, value_scores=1.0, highest_value=1e5)
    batch = torch.tensor([0, 5, 7, 9]), torch.arange(9, dtype=torch.int32), HUGE
    found = direct(weights, RaggedCells(*batch), dtype=torch.float16).features
    assert weights.value_weight is not None
    smaller = weights._replace(value_weight=1e5 * weights.value_weight)
    batch = (*batch[:2], HUGE.double() / 1e5)
    exact = reference.encode(convert(smaller, torch.float64), *batch).features
    rough = reference.encode(convert(smaller, torch.float16), *batch).features
    limit = 2 * errors_per_cell(rough, exact).max()
    assert errors_per_cell(found.cpu(), exact).max() <= limit


def test_values_that_float16_overflows_weigh_what_they_should(
    random_weights: MakeWeights, compare: Compare
) -> None:
    """All entries weigh the same, so that every value counts to the last digit."""
    weights = random_weights(self_blocks=0)
    weights.cross.in_weight[:10] = 0
    weights.cross.in_bias[:10] = 0
    values = 1e5 * torch.rand(211, generator=torch.Generator().manual_seed(0)) - 3e4
    genes = torch.arange(211, dtype=torch.int32) % 101
    compare(weights, RaggedCells(torch.tensor([0, 211]), genes, values))


# --- sizes of encoders -------------------------------------------------------------------------


@each_type
def test_the_paper_s_encoder(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, dtype: torch.dtype
) -> None:
    weights = random_weights(
        head_dim=16, patches=64, mlp_dim=64, projection=10, self_blocks=2, dtype=dtype
    )
    assert encoder.fits(weights)
    for options in ({}, {"mean": True}):
        compare(weights, random_cells([23, 0]), **options)


@pytest.mark.parametrize(
    "dimensions",
    [
        pytest.param({"patches": 67}, id="patches"),
        pytest.param({"head_dim": 37}, id="dim"),
        pytest.param({"mlp_dim": 131}, id="mlp"),
        pytest.param({"projection": 67}, id="projection"),
    ],
)
def test_encoders_beyond_the_fused_kernel(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    dimensions: dict[str, int],
) -> None:
    weights = random_weights(**dimensions)
    assert not encoder.fits(weights)
    compare(weights, random_cells([23, 0, 70]), torch.tensor([0, 3, 1]))
    compare(weights, random_cells([5]), mean=True)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("bins", [None, 6])
def test_numbers_of_heads(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    heads: int,
    bins: int | None,
) -> None:
    weights = random_weights(heads=heads, bins=bins)
    compare(weights, random_cells([23]), torch.tensor([3]))


# --- pads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [None, 6])
@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 7, 1], [2**20, 2**20, 2**20], [0, 0, 2**31 + 1]])
def test_pads(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    bins: int | None,
    pads: list[int],
) -> None:
    compare(random_weights(bins=bins, self_blocks=0), random_cells([23, 0, 1]), torch.tensor(pads))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_types_of_pads(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, dtype: torch.dtype
) -> None:
    weights = random_weights(self_blocks=0)
    compare(weights, random_cells([3, 0]), torch.tensor([2, 5], dtype=dtype))


# --- the cross-attention alone -----------------------------------------------------------------


@pytest.mark.parametrize("scores", [None, 150.0])
@each_kind
def test_cross_attention_alone(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    kind: str,
    scores: float | None,
) -> None:
    """Attended values, and the log-sum-exp of scores with every constant part."""
    weights = random_weights(gene_scores=scores, **bins_of(kind))
    cells = random_cells([70, 0, 1, 0], **values_of(kind))
    pads = torch.tensor([0, 0, 4, 2])
    there = cells.to(device)
    with poisoned():
        attended, log_sum_exp = patch_attention(
            move(weights, device), there.offsets, there.genes, there.values,
            pads=pads.to(device), backend="triton",
        )  # fmt: skip
    exact = reference.patch_cross_attention(
        convert(weights, torch.float64), cells.offsets, cells.genes,
        cells.values.double() if kind == "continuous" else cells.values, pads=pads,
    )  # fmt: skip
    some = torch.tensor([0, 2, 3])
    assert (attended[1] == 0).all()
    assert errors_per_cell(attended.cpu()[some], exact.attended[some]).max() <= 1e-5
    assert (log_sum_exp[1] == -torch.inf).all()
    assert errors_per_cell(log_sum_exp.cpu()[some], exact.log_sum_exp[some]).max() <= 1e-5


# --- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [("integers", TYPES[0]), ("continuous", TYPES[-1]), ("binned", TYPES[0])]
)
def test_split_cells_have_the_same_bits(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    direct: Run,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Whether a batch's chunks get programs of their own must not show."""
    weights = random_weights(self_blocks=0, dtype=dtype, gene_scores=90.0, **bins_of(kind))
    cells = random_cells([3, 1025, 0, 40], **values_of(kind))
    pads = torch.tensor([0, 2, 1, 0])
    whole = direct(weights, cells, pads, split=False).features
    assert whole.isfinite().all()
    assert torch.equal(direct(weights, cells, pads, split=True).features, whole)


def test_long_cells_have_the_same_bits_alone(
    random_weights: MakeWeights, random_cells: MakeCells, direct: Run
) -> None:
    """A chunk begins where its cell begins, wherever that is in the batch."""
    weights = random_weights(self_blocks=0, dtype=torch.float16)
    cells = random_cells([37, 1040, 1, 1030])
    whole = direct(weights, cells).features
    for order in ([3, 1], [1], [3]):
        some = cells.take(torch.tensor(order))
        for split in (False, True):
            assert torch.equal(direct(weights, some, split=split).features, whole[order])


def test_stages_of_the_pipeline_do_not_change_bits(
    random_weights: MakeWeights, random_cells: MakeCells, direct: Run
) -> None:
    """They are chosen by the length of a batch's cells."""
    weights, cells = random_weights(self_blocks=0), random_cells([70, 3])
    found = [
        direct(weights, cells, configuration=encoder.Configuration(64, 4, stages)).features
        for stages in (1, 2, 3)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
