"""Preprocessing: scanpy's values, exact rounding, and a cell's result depends on it alone."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.cells import CellBlock, RaggedCells
from cellpatch_fast.config import CellPatchConfig, Preprocessing
from cellpatch_fast.errors import InputError
from cellpatch_fast.preprocessing.detection import InputKind
from cellpatch_fast.preprocessing.tokens import Tokenized, _boundaries, tokenize
from cellpatch_fast.preprocessing.tokens_compiled import library_size

CELLS, GENES = 131, 211
CONTINUOUS = Preprocessing(value_clip=None, value_rounding="none")
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "float32", "float64", ">i4", ">f4"]


def draw_block(seed: int = 0, dtype: str = "float32", start: int = 0) -> CellBlock:
    """Counts with stored zeros, and empty cells at the front, in the middle and at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, GENES, CELLS)
    lengths[[0, CELLS // 2, -1]] = 0
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    columns = [rng.permutation(GENES)[:length] for length in lengths]
    data = rng.negative_binomial(0.5, 0.05, indptr[-1]).clip(max=120).astype(dtype)
    return CellBlock(start, indptr, np.concatenate(columns).astype(np.int32), data)


def draw_tokens(seed: int = 0, size: int = 10_007) -> np.ndarray:
    """A token for each gene; a quarter of the genes is unknown, two share a token."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(np.arange(1, size), GENES, replace=False).astype(np.int32)
    tokens[rng.random(GENES) < 0.25] = -1
    tokens[[2, 3]] = size - 1
    return tokens


def run(
    block: CellBlock,
    tokens: np.ndarray,
    preprocessing: Preprocessing = CONTINUOUS,
    kind: InputKind = "counts",
    size: int = 10_007,
) -> Tokenized:
    return tokenize(block, tokens, preprocessing, kind, size, "a file")


def define(
    block: CellBlock, tokens: np.ndarray, preprocessing: Preprocessing, kind: str = "counts"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition in float64 numpy, cell by cell: offsets, genes, values.

    A cell's entries are ordered by token, then by value.
    """
    lengths, genes, values = [0], [], []
    for first, last in zip(block.indptr[:-1], block.indptr[1:], strict=True):
        row = block.data[first:last].astype(np.float64)
        token = tokens[block.indices[first:last]]
        keep = (row != 0) & (token >= 0)
        if kind != "lognorm":
            # not row.sum(), which adds in pairs
            library = math.fsum(row) if (row == np.rint(row)).all() else sum(row.tolist())
            row = np.log1p(row * (preprocessing.target_sum / library if library else 0.0))
        if preprocessing.value_clip is not None:
            row = np.minimum(row, preprocessing.value_clip)
        if preprocessing.value_rounding == "round":
            row = np.rint(row)
        if preprocessing.value_rounding == "truncate":
            row = np.trunc(row)
        row, token = row[keep], token[keep]
        order = np.lexsort([row, token])
        lengths.append(len(order))
        genes.append(token[order])
        values.append(row[order])
    return np.cumsum(lengths), np.concatenate(genes), np.concatenate(values)


def order_of_entries(block: CellBlock, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The entries of a block that are kept, by cell, then token, then value."""
    cell = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
    token = tokens[block.indices]
    order = np.lexsort([values, token, cell])
    return order[(block.data[order] != 0) & (token[order] >= 0)]


def assert_same(a: RaggedCells, b: RaggedCells) -> None:
    """Bit for bit."""
    for name in ("offsets", "genes", "values"):
        left, right = getattr(a, name).numpy(), getattr(b, name).numpy()
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target_sum", [1e4, 997.0])
@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_agrees_with_scanpy(dtype: str, target_sum: float) -> None:
    """normalize_total and log1p to 1e-6; entries in the order of the tokens; zeros dropped."""
    scanpy = pytest.importorskip("scanpy")
    block, tokens = draw_block(dtype=dtype), draw_tokens()
    matrix = sp.csr_matrix((block.data, block.indices, block.indptr), (CELLS, GENES))
    adata = anndata.AnnData(matrix.copy())
    scanpy.pp.normalize_total(adata, target_sum=target_sum)
    scanpy.pp.log1p(adata)
    order = order_of_entries(block, tokens, adata.X.data)
    preprocessing = Preprocessing(target_sum, None, "none")
    cells = run(block, tokens, preprocessing).cells
    np.testing.assert_array_equal(cells.genes.numpy(), tokens[block.indices][order])
    np.testing.assert_allclose(cells.values.numpy(), adata.X.data[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_value(dtype: str) -> None:
    block, tokens = draw_block(dtype=dtype), draw_tokens()
    for preprocessing in (Preprocessing(), CONTINUOUS):
        result = run(block, tokens, preprocessing)
        offsets, genes, values = define(block, tokens, preprocessing)
        np.testing.assert_array_equal(result.cells.offsets.numpy(), offsets)
        np.testing.assert_array_equal(result.cells.genes.numpy(), genes)
        tolerance = 0 if preprocessing.discrete else 2**-23
        np.testing.assert_allclose(result.cells.values.numpy(), values, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "int64", "uint64", ">i4", ">u8"])
def test_every_type_of_index(dtype: str) -> None:
    block, tokens = draw_block(), draw_tokens()
    other = CellBlock(0, block.indptr.astype(np.uint32), block.indices.astype(dtype), block.data)
    assert_same(run(other, tokens).cells, run(block, tokens).cells)


def test_read_only_and_strided_arrays() -> None:
    """What memory maps and slices of other arrays look like; the input is left alone."""
    block, tokens = draw_block(), draw_tokens()
    before = block.data.copy()
    strided = CellBlock(
        0, block.indptr, np.repeat(block.indices, 2)[::2], np.repeat(block.data, 3)[::3]
    )
    for array in (strided.indptr, strided.indices, strided.data):
        array.flags.writeable = False
    assert_same(run(strided, tokens).cells, run(block, tokens).cells)
    np.testing.assert_array_equal(block.data, before)


COUNTS = st.one_of(
    st.integers(0, 3).map(float),
    st.integers(0, 2**53).map(float),
    st.floats(1e-9, 100),
    st.floats(1e-9, 1e300),
)


@st.composite
def blocks(draw: st.DrawFn, values: st.SearchStrategy[float] = COUNTS) -> CellBlock:
    rows = draw(st.lists(st.lists(values, max_size=GENES), max_size=7))
    indptr = np.cumsum([0, *map(len, rows)])
    first = draw(st.integers(0, GENES - 1))
    columns = [(first + np.arange(len(row)) * 7) % GENES for row in rows]
    indices = np.concatenate([np.empty(0, int), *columns]).astype(np.int32)
    return CellBlock(0, indptr, indices, np.array([x for row in rows for x in row], np.float64))


@settings(max_examples=150, deadline=None)
@given(
    block=blocks(),
    preprocessing=st.builds(
        Preprocessing,
        target_sum=st.sampled_from([1e4, 1.0, 1e6, 12345.678]),
        value_clip=st.sampled_from([5.0, 0.3, 2.5, 3.5, 13.0]),
        value_rounding=st.sampled_from(["round", "truncate", "none"]),
    ),
)
def test_values_are_those_of_the_definition(block: CellBlock, preprocessing: Preprocessing) -> None:
    """Discrete values exactly, continuous ones to float32, whatever the counts."""
    tokens = draw_tokens()
    result = run(block, tokens, preprocessing)
    if len(block.indptr) == 1:
        assert len(result.cells) == result.cells.entries == 0
        return
    offsets, genes, values = define(block, tokens, preprocessing)
    np.testing.assert_array_equal(result.cells.offsets.numpy(), offsets)
    np.testing.assert_array_equal(result.cells.genes.numpy(), genes)
    tolerance = 0 if preprocessing.discrete else 2**-23
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    np.testing.assert_allclose(result.cells.values.numpy(), values, tolerance, smallest)
    result.cells.validate(10_007)


@settings(max_examples=60, deadline=None)
@given(
    block=blocks(st.one_of(st.floats(0, 20), st.integers(0, 40).map(lambda x: x / 4))),
    preprocessing=st.builds(
        Preprocessing,
        value_clip=st.sampled_from([5.0, 2.5, 13.0]),
        value_rounding=st.sampled_from(["round", "truncate", "none"]),
    ),
)
def test_logged_values_are_clipped_and_rounded_half_to_even(
    block: CellBlock, preprocessing: Preprocessing
) -> None:
    if len(block.indptr) == 1:
        return
    tokens = draw_tokens()
    result = run(block, tokens, preprocessing, "lognorm")
    offsets, genes, values = define(block, tokens, preprocessing, "lognorm")
    np.testing.assert_array_equal(result.cells.offsets.numpy(), offsets)
    np.testing.assert_array_equal(result.cells.genes.numpy(), genes)
    expected = values if preprocessing.discrete else values.astype(np.float32)
    np.testing.assert_array_equal(result.cells.values.numpy(), expected)


@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_boundaries_are_exact(rounding: str) -> None:
    """Each is the smallest float64 whose exact logarithm rounds to the next value."""
    boundaries = _boundaries(Preprocessing(1e4, 255.0, rounding), logged=False)  # type: ignore[arg-type]
    assert len(boundaries) == 255
    with localcontext() as context:
        context.prec = 150
        for value, boundary in enumerate(boundaries, start=1):
            edge = Decimal(value) - (Decimal("0.5") if rounding == "round" else 0)
            below = math.nextafter(boundary, 0.0)
            assert (1 + Decimal(below)).ln() < edge <= (1 + Decimal(boundary)).ln()


@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_values_step_at_the_boundaries(rounding: str) -> None:
    preprocessing = Preprocessing(1e4, 5.0, rounding)  # type: ignore[arg-type]
    boundaries = _boundaries(preprocessing, logged=False)
    row = np.stack([np.nextafter(boundaries, 0), boundaries], 1).ravel()
    row = np.append(row, 1e4 - math.fsum(row))  # library size: just what the model expects
    while library_size(row) != 1e4:
        row[-1] += 1e4 - library_size(row)
    block = CellBlock(0, np.array([0, 11]), np.arange(11, dtype=np.int32), row)
    values = run(block, np.arange(1, 12), preprocessing).cells.values
    assert values.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("kind", ["counts", "lognorm"])
def test_what_is_dropped_and_what_stays(kind: InputKind) -> None:
    """Zeros and unknown genes go, expressed genes that round to 0 stay, empty cells stay."""
    rows = [[0.0, 0.01, 3.0, -0.0], [], [5.0], [0.0, 0.0], [0.25]]
    block = CellBlock(
        0,
        np.cumsum([0, *map(len, rows)]),
        np.array([0, 1, 3, 4, 2, 0, 1, 3], np.int32),
        np.array([x for row in rows for x in row]),
    )
    tokens = np.array([7, 5, -1, 3, 2])
    result = run(block, tokens, Preprocessing(target_sum=1.0), kind)
    assert result.cells.offsets.tolist() == [0, 2, 2, 2, 2, 3]
    assert result.cells.genes.tolist() == [3, 5, 3]
    assert result.cells.values.tolist() == ([1, 0, 1] if kind == "counts" else [3, 0, 0])
    assert result.unknown_entries == 1
    assert result.empty_cells == 3


def test_unknown_genes_belong_to_the_library() -> None:
    """A known gene's value is the same whether or not the other genes are known."""
    block, some = draw_block(), draw_tokens()
    every = np.where(some >= 0, some, 10_007 + np.arange(GENES))  # the others follow
    known = run(block, some)
    all_known = run(block, every, size=10_007 + GENES).cells
    keep = all_known.genes.numpy() < 10_007
    np.testing.assert_array_equal(known.cells.genes.numpy(), all_known.genes.numpy()[keep])
    np.testing.assert_array_equal(known.cells.values.numpy(), all_known.values.numpy()[keep])
    assert known.unknown_entries == int((~keep).sum()) > 0


def test_normalising_normalised_values_changes_nothing() -> None:
    """Which is why "normalized" is handled as counts."""
    block, tokens = draw_block(dtype="float64"), draw_tokens()
    library = np.add.reduceat(np.append(block.data, 0), block.indptr[:-1])
    lengths = np.diff(block.indptr)
    scale = np.repeat(1e6 / np.where(lengths > 0, library, 1), lengths)
    scaled = CellBlock(0, block.indptr, block.indices, block.data * scale)
    np.testing.assert_allclose(
        run(scaled, tokens, kind="normalized").cells.values.numpy(),
        run(block, tokens).cells.values.numpy(),
        rtol=2**-22,
    )


@pytest.mark.parametrize("size", [65_536, 65_537])
def test_tokens_are_uint16_where_they_fit(size: int) -> None:
    block, tokens = draw_block(), draw_tokens(size=size)
    genes = run(block, tokens, size=size).cells.genes
    assert genes.dtype == (torch.uint16 if size == 65_536 else torch.int32)
    assert int(genes.long().max()) == size - 1


@pytest.mark.parametrize("preprocessing", [Preprocessing(), CONTINUOUS])
def test_any_division_into_blocks_and_any_order_gives_the_same_bits(
    preprocessing: Preprocessing,
) -> None:
    block, tokens = draw_block(dtype="float64"), draw_tokens()
    block.data[:] *= np.random.default_rng(3).random(len(block.data))  # sums that round
    whole = run(block, tokens, preprocessing)
    for size in (1, 7, 64, 1000):
        parts = [
            run(part, tokens, preprocessing)
            for part in (cut(block, i, i + size) for i in range(0, CELLS, size))
        ]
        assert_same(RaggedCells.concatenate([part.cells for part in parts]), whole.cells)
        assert sum(part.unknown_entries for part in parts) == whole.unknown_entries
        assert sum(part.empty_cells for part in parts) == whole.empty_cells
    order = np.random.default_rng(4).integers(0, CELLS, 2 * CELLS)  # some come several times
    settings = (preprocessing, "counts", 10_007, "a file")
    ordered = tokenize(block, tokens, *settings, order=order)  # type: ignore[arg-type]
    assert_same(ordered.cells, whole.cells.take(torch.from_numpy(order)))
    np.testing.assert_array_equal(ordered.unknown, whole.unknown[order])


def cut(block: CellBlock, start: int, stop: int) -> CellBlock:
    indptr = block.indptr[start : stop + 1]
    entries = slice(indptr[0], indptr[-1])
    return CellBlock(start, indptr - indptr[0], block.indices[entries], block.data[entries])


@pytest.mark.parametrize("kind", ["counts", "lognorm"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, -math.inf])
def test_invalid_value_names_cell_and_gene(kind: InputKind, value: float) -> None:
    """The first one, whatever thread finds another first."""
    block = draw_block(start=100_003)
    cell = 70
    entry = int(block.indptr[cell + 1]) - 1
    block.data[[entry, -1]] = value
    column = block.indices[entry]
    names = [f"GENE{i}" for i in range(GENES)]
    with pytest.raises(InputError) as error:
        tokenize(block, draw_tokens(), Preprocessing(), kind, 10_007, "bad.h5ad", names)
    for part in (
        *("bad.h5ad", f"cell {100_003 + cell} ", f"column {column} (GENE{column})"),
        *(f"{value:.6g}", "use_raw"),
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("row", [[1e308, 1e308], [5e-324, 0.0]], ids=["too large", "too small"])
def testlibrary_size_that_cannot_be_divided_by(row: list[float]) -> None:
    block = CellBlock(41, np.array([0, 0, 2]), np.arange(2, dtype=np.int32), np.array(row))
    with pytest.raises(InputError, match=r"a file: cell 42 .* library size"):
        run(block, draw_tokens())


@pytest.mark.parametrize("column", [GENES, -1, 2**32 + 5])
def test_column_outside_of_the_matrix(column: int) -> None:
    block = CellBlock(43, np.array([0, 1]), np.array([column]), np.array([1.0]))
    with pytest.raises(InputError, match=rf"a file: cell 43 .* column {column}, but .* {GENES} "):
        run(block, draw_tokens())


@pytest.mark.parametrize("indptr", [[], [1, 2], [0, 2, 1, 3], [0, 2], [0, 4]])
def test_row_pointers_that_do_not_fit(indptr: list[int]) -> None:
    block = CellBlock(47, np.array(indptr), np.arange(3, dtype=np.int32), np.ones(3))
    with pytest.raises(InputError, match=r"a file: .* damaged near cell 47"):
        run(block, draw_tokens())


def test_tokens_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token 10006 in a vocabulary of size 10006"):
        run(draw_block(), draw_tokens(), size=10_006)


def test_preprocessing_of_a_model() -> None:
    config = CellPatchConfig(target_sum=1e6, value_clip=None, value_rounding="none")
    assert Preprocessing.from_config(config) == Preprocessing(1e6, None, "none")
    assert Preprocessing.from_config(CellPatchConfig()) == Preprocessing()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"target_sum": 0.0}, "target_sum"),
        ({"target_sum": math.nan}, "target_sum"),
        ({"value_rounding": "floor"}, "'floor'"),
        ({"value_clip": None}, "found None"),
        ({"value_clip": 256.0}, "found 256"),
        ({"value_clip": -1.0, "value_rounding": "none"}, "found -1"),
    ],
)
def test_preprocessing_that_makes_no_sense(fields: dict, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        Preprocessing(**fields)
