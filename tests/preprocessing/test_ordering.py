"""Packed cells: one order of a cell's entries, whatever their order in the file."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.cells import CellBlock
from cellpatch_fast.config import Preprocessing
from cellpatch_fast.preprocessing.detection import InputKind
from cellpatch_fast.preprocessing.ordering import digit_bits, order_entries
from cellpatch_fast.preprocessing.tokens import tokenize

# Vocabularies of one gene, of the human genes, and around the ends of a digit and of uint16.
VOCABULARIES = [1, 2, 255, 256, 300, 60_665, 65_535, 65_536, 70_000, 300_000]
CONTINUOUS = Preprocessing(value_clip=None, value_rounding="none")

Cell = list[tuple[int, float]]  # tokens and values


def pack(cells: list[Cell], vocabulary: int, dtype: str) -> tuple[np.ndarray, ...]:
    """The cells, each ordered where it lies among the others."""
    offsets = np.cumsum([0, *map(len, cells)])
    genes = np.array(
        [token for cell in cells for token, _ in cell],
        np.uint16 if vocabulary < 1 << 16 else np.int32,
    )
    values = np.array([value for cell in cells for _, value in cell], dtype)
    room = np.empty_like(genes), np.empty_like(values)
    counts = np.empty(1 << digit_bits(vocabulary + 1), np.uint32)
    for start, stop in itertools.pairwise(offsets):
        order_entries(genes[start:stop], values[start:stop], *room, counts)
    return offsets, genes, values


def assert_in_order(packed: tuple[np.ndarray, ...], cells: list[Cell], dtype: str) -> None:
    """By token, then by value, as Python sorts pairs."""
    offsets, genes, values = packed
    assert offsets.tolist() == np.cumsum([0, *map(len, cells)]).tolist()
    entries = [entry for cell in cells for entry in sorted(cell)]
    assert genes.tolist() == [token for token, _ in entries]
    assert values.dtype == dtype
    assert values.tolist() == [value for _, value in entries]


@st.composite
def vocabularies_and_cells(draw: st.DrawFn) -> tuple[int, list[Cell]]:
    """Cells with tokens from all over the vocabulary, some repeated; some cells are empty."""
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    ends = [t for t in (1, 2, 255, 256, 257, 511, 512, 65_536) if t <= vocabulary]
    tokens = st.integers(1, vocabulary) | st.sampled_from([*ends, vocabulary])
    cell = st.lists(st.tuples(tokens, st.integers(0, 255).map(float)), max_size=53)
    return vocabulary, draw(st.lists(cell | cell.map(sorted), max_size=7))


@settings(max_examples=200, deadline=None)
@given(vocabulary_and_cells=vocabularies_and_cells(), dtype=st.sampled_from(["uint8", "float32"]))
def test_entries_are_ordered_by_token_then_value(
    vocabulary_and_cells: tuple[int, list[Cell]], dtype: str
) -> None:
    vocabulary, cells = vocabulary_and_cells
    packed = pack(cells, vocabulary, dtype)
    assert packed[1].dtype == (np.uint16 if vocabulary < 1 << 16 else np.int32)
    assert_in_order(packed, cells, dtype)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_cell_of_every_gene(vocabulary: int) -> None:
    """The longest cells there are: backwards, shuffled, in order; an empty one between them."""
    every = [(token, float(token % 7)) for token in range(1, vocabulary + 1)]
    shuffled = [every[i] for i in np.random.default_rng(0).permutation(vocabulary)]
    cells = [every[::-1], shuffled, [], every]
    assert_in_order(pack(cells, vocabulary, "uint8"), cells, "uint8")


def test_cells_in_order_stay_as_they_are() -> None:
    cells = [[(token, 1.0) for token in range(1, length)] for length in (3, 1, 5, 2)]
    _, genes, _ = pack(cells, 300, "float32")
    assert genes.tolist() == [1, 2, 1, 2, 3, 4, 1]


CELLS, GENES = 137, 211


def draw(vocabulary: int, seed: int = 0) -> tuple[CellBlock, np.ndarray]:
    """Counts, and tokens of which a third is repeated and some are unknown; two empty cells."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, GENES, CELLS)
    lengths[[0, 71]] = 0
    indices = np.concatenate([rng.permutation(GENES)[:length] for length in lengths])
    counts = rng.negative_binomial(0.5, 0.05, len(indices)).astype(np.float32)
    tokens = rng.integers(1, vocabulary, GENES, dtype=np.int32, endpoint=True)
    tokens[: GENES // 3] = tokens[-(GENES // 3) :]
    tokens[rng.random(GENES) < 0.1] = -1
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return CellBlock(0, indptr, indices.astype(np.int32), counts), tokens


def bits(
    block: CellBlock, tokens: np.ndarray, preprocessing: Preprocessing, kind: InputKind, size: int
) -> list[bytes]:
    cells = tokenize(block, tokens, preprocessing, kind, size, "a file").cells
    assert cells.entries > 0
    return [array.numpy().tobytes() for array in (cells.offsets, cells.genes, cells.values)]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ["counts", "lognorm"])
@pytest.mark.parametrize("preprocessing", [Preprocessing(), CONTINUOUS], ids=["discrete", "all"])
def test_shuffled_entries_and_permuted_genes_give_the_same_bits(
    vocabulary: int, kind: InputKind, preprocessing: Preprocessing
) -> None:
    """Whole counts, whose library sizes are exact, and logarithms, which need none."""
    block, tokens = draw(vocabulary)
    rng = np.random.default_rng(1)
    if kind == "lognorm":
        block.data[:] *= rng.random(len(block.data), np.float32) / 8
    expected = bits(block, tokens, preprocessing, kind, vocabulary + 1)

    cell = np.repeat(np.arange(CELLS), np.diff(block.indptr))
    order = np.lexsort([rng.random(len(cell)), cell])  # cells stay, their entries are shuffled
    shuffled = CellBlock(0, block.indptr, block.indices[order], block.data[order])
    assert bits(shuffled, tokens, preprocessing, kind, vocabulary + 1) == expected

    column = rng.permutation(GENES).astype(np.int32)  # where each gene goes
    permuted = CellBlock(0, block.indptr, column[block.indices], block.data)
    tokens_permuted = np.empty_like(tokens)
    tokens_permuted[column] = tokens
    assert bits(permuted, tokens_permuted, preprocessing, kind, vocabulary + 1) == expected

    ascending = np.lexsort([tokens[block.indices], cell])
    ordered = CellBlock(0, block.indptr, block.indices[ascending], block.data[ascending])
    assert bits(ordered, tokens, preprocessing, kind, vocabulary + 1) == expected
