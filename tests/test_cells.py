"""RaggedCells refuses what does not fit, and no operation on it loses or mixes up an entry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.cells import RaggedCells

Entries = list[tuple[int, int]]  # (gene, value) of one cell

a_cell = st.lists(st.tuples(st.integers(1, 2**16 - 1), st.integers(0, 255)), max_size=7)
some_cells = st.lists(a_cell, max_size=11)


def make(
    cells: list[Entries],
    genes: torch.dtype = torch.int32,
    values: torch.dtype = torch.uint8,
    offsets: torch.dtype = torch.int64,
) -> RaggedCells:
    lengths = torch.tensor([0, *map(len, cells)]).cumsum(0)
    entries = [entry for cell in cells for entry in cell]
    return RaggedCells(
        lengths.to(offsets),
        torch.tensor([gene for gene, _ in entries], dtype=torch.int64).to(genes),
        torch.tensor([value for _, value in entries]).to(values),
    )


def entries_of(cells: RaggedCells) -> list[Entries]:
    """The cells as plain lists, after checking them."""
    cells.validate()
    offsets, genes, values = (t.tolist() for t in (cells.offsets, cells.genes, cells.values))
    return [
        list(zip(genes[start:stop], values[start:stop], strict=True))
        for start, stop in itertools.pairwise(offsets)
    ]


THREE: list[Entries] = [[(5, 1), (65_535, 2)], [], [(7, 3), (7, 4), (1, 0)]]
NAMES = ("offsets", "genes", "values")


def tensors(**changed: Any) -> dict[str, torch.Tensor]:
    cells = make(THREE)
    return {name: getattr(cells, name) for name in NAMES} | changed


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("genes", [torch.uint16, torch.uint32, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "values", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_type_works(genes: torch.dtype, values: torch.dtype, offsets: torch.dtype) -> None:
    cells = make(THREE, genes, values, offsets)
    assert entries_of(cells) == THREE
    assert entries_of(cells.slice(1, 3)) == THREE[1:]
    assert entries_of(cells.take(torch.tensor([2, 0]))) == [THREE[2], THREE[0]]
    assert entries_of(RaggedCells.concatenate([cells, cells])) == 2 * THREE
    for part in (cells.take(torch.tensor([2])), RaggedCells.concatenate([cells, cells])):
        assert (part.genes.dtype, part.values.dtype) == (genes, values)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": torch.zeros(2, 2, dtype=torch.int64)}, r"offsets must be one-dim.*\[2, 2\]"),
        ({"genes": torch.zeros(5, 1, dtype=torch.int32)}, r"genes must be one-dim.*\[5, 1\]"),
        ({"values": torch.tensor(1.0)}, r"values must be one-dimensional, found shape \[\]"),
        ({"offsets": torch.tensor([0.0, 5.0])}, "offsets must have dtype int32, int64; found"),
        ({"genes": torch.zeros(5)}, "genes must have dtype uint16, uint32, int32, int64; found"),
        ({"genes": torch.zeros(5, dtype=torch.uint8)}, "genes must have dtype .*torch.uint8"),
        ({"values": torch.zeros(5, dtype=torch.int64)}, "values must have dtype .*torch.int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets needs at least one element"),
        ({"values": torch.zeros(4)}, "5 genes but 4 values"),
        ({"values": torch.zeros(5, device="meta")}, "on different devices: cpu, cpu, meta"),
    ],
)
def test_refused_at_construction(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedCells(**tensors(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": torch.tensor([1, 5])}, r"number of entries \(5\); they run from 1 to 5"),
        ({"offsets": torch.tensor([0, 4])}, r"number of entries \(5\); they run from 0 to 4"),
        ({"offsets": torch.tensor([0, 2, 1, 5])}, "offsets decrease after cell 1"),
        (
            {"genes": torch.tensor([1, 2, 3, 9, 11])},
            "entry 3 has gene token 9, but the model knows tokens 0 to 8",
        ),
        ({"genes": torch.tensor([1, 2, -3, 4, 9])}, "entry 2 has gene token -3"),
    ],
)
def test_refused_by_validate(changed: dict[str, torch.Tensor], message: str) -> None:
    cells = RaggedCells(**tensors(genes=torch.tensor([1, 2, 3, 4, 5])) | changed)
    with pytest.raises(ValueError, match=message):
        cells.validate(9)


def test_validate_without_a_number_of_genes_checks_offsets_only() -> None:
    make(THREE).validate()
    make(THREE).validate(65_536)
    make([[], []]).validate(1)
    make([]).validate(1)


@given(some_cells)
def test_sizes(cells: list[Entries]) -> None:
    ragged = make(cells)
    assert len(ragged) == len(cells)
    assert ragged.entries == sum(map(len, cells))
    assert ragged.lengths.tolist() == [*map(len, cells)]
    assert ragged.lengths.dtype == torch.int64


# --- parts and wholes --------------------------------------------------------------------------


@given(some_cells, st.integers(-13, 13), st.integers(-13, 13))
def test_slice_is_that_of_a_list(cells: list[Entries], start: int, stop: int) -> None:
    assert entries_of(make(cells).slice(start, stop)) == cells[start:stop]


def test_slice_copies_no_entries() -> None:
    cells = make(THREE)
    part = cells.slice(1, 3)
    assert part.genes.data_ptr() == cells.genes[2:].data_ptr()
    assert part.values.data_ptr() == cells.values[2:].data_ptr()


@given(some_cells, st.data())
def test_take_any_cells_in_any_order(cells: list[Entries], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(-len(cells), len(cells) - 1))) if cells else []
    taken = make(cells, torch.uint16).take(torch.tensor(order, dtype=torch.int64))
    assert entries_of(taken) == [cells[cell] for cell in order]


@given(st.lists(some_cells, min_size=1, max_size=4))
def test_concatenate_joins_in_order(batches: list[list[Entries]]) -> None:
    whole = RaggedCells.concatenate([make(cells, torch.uint16) for cells in batches])
    assert entries_of(whole) == [cell for cells in batches for cell in cells]
    assert whole.genes.dtype == torch.uint16


def test_concatenate_slices() -> None:
    """Whose offsets begin anew at 0."""
    cells = make(THREE, torch.uint16)
    parts = [cells.slice(i, i + 1) for i in range(3)]
    assert entries_of(RaggedCells.concatenate(parts)) == THREE


def test_concatenate_nothing() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        RaggedCells.concatenate([])


# --- padding -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(a_cell, min_size=1, max_size=11), st.integers(0, 5), st.booleans())
def test_padded_and_back(cells: list[Entries], more: int, left: bool) -> None:
    """Padding on either side: where entries are is what ``keep`` says."""
    ragged = make(cells, torch.uint16)
    length = max(map(len, cells)) + more
    genes, values = ragged.to_padded(length)
    assert genes.shape == values.shape == (len(cells), length)
    keep = torch.arange(length) < ragged.lengths[:, None]
    assert not genes[~keep].any()
    assert not values[~keep].any()
    if left:
        genes, values, keep = genes.flip(1), values.flip(1), keep.flip(1)
        cells = [cell[::-1] for cell in cells]
    back = RaggedCells.from_padded(genes, values, keep)
    assert entries_of(back) == cells
    assert back.values.dtype == ragged.values.dtype


def test_padded_to_the_longest_cell() -> None:
    genes, values = make(THREE).to_padded()
    assert genes.tolist() == [[5, 65_535, 0], [0, 0, 0], [7, 7, 1]]
    assert values.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 0]]
    assert make([[], []]).to_padded()[0].shape == (2, 0)


def test_from_padded_keeps_entries_of_value_0() -> None:
    """An expressed gene whose value rounds to 0 is an entry."""
    genes, values = torch.tensor([[3, 4, 0]]), torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    cells = RaggedCells.from_padded(genes, values, genes != 0)
    assert entries_of(cells) == [[(3, 0), (4, 1)]]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_from_padded_with_unsigned_genes(dtype: torch.dtype) -> None:
    genes = torch.tensor([[3, 65_535, 0]]).to(dtype)
    keep = torch.tensor([[True, True, False]])
    cells = RaggedCells.from_padded(genes, torch.ones(1, 3), keep)
    assert entries_of(cells) == [[(3, 1.0), (65_535, 1.0)]]
    assert cells.genes.dtype == dtype


def test_padding_no_cells() -> None:
    genes, values = make([]).to_padded()
    assert len(genes) == len(values) == 0


def test_padding_to_less_than_the_longest_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="3"):
        make(THREE).to_padded(2)


def test_moved_cells_are_the_same() -> None:
    assert entries_of(make(THREE).to("cpu", non_blocking=True)) == THREE
    assert make(THREE).to("meta").device.type == "meta"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    cells = make(THREE, torch.uint16)
    on_gpu = cells.pin_memory().to("cuda", non_blocking=True)
    assert on_gpu.device.type == "cuda"
    assert entries_of(on_gpu.take(torch.tensor([2, 0], device="cuda")).to("cpu")) == [
        THREE[2],
        THREE[0],
    ]
    assert entries_of(RaggedCells.concatenate([on_gpu, on_gpu]).to("cpu")) == 2 * THREE
