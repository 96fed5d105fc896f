"""The kind of a matrix is found from its values, or the matrix is refused with a way out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.cells import CellBlock
from cellpatch_fast.config import Expected
from cellpatch_fast.errors import InputError
from cellpatch_fast.preprocessing.detection import InputKindWarning, detect_input

CELLS, GENES = 61, 307


def block_of(matrix: np.ndarray | sp.csr_matrix, start: int = 0) -> CellBlock:
    if isinstance(matrix, sp.csr_matrix):
        return CellBlock(start, matrix.indptr.astype(np.int64), matrix.indices, matrix.data)
    rows, columns = np.nonzero(matrix)
    indptr = np.searchsorted(rows, np.arange(len(matrix) + 1))
    return CellBlock(start, indptr, columns, matrix[rows, columns])


def draw_counts(seed: int = 0) -> np.ndarray:
    """Overdispersed counts, deeper in some cells than in others."""
    rng = np.random.default_rng(seed)
    depth = rng.gamma(4, 0.5, size=(CELLS, 1))
    return rng.poisson(depth * rng.gamma(0.3, 4.0, size=GENES)).astype(np.float32)


def normalise(counts: np.ndarray, target_sum: float = 1e4) -> np.ndarray:
    return (counts * (target_sum / counts.sum(1, keepdims=True))).astype(np.float32)


COUNTS = draw_counts()
ESTIMATED = np.where(COUNTS > 20, COUNTS + np.float32(0.37), COUNTS)  # ambiguous reads shared out
CORRECTED = np.maximum(COUNTS * 0.973 - 0.113, 0)  # ambient RNA subtracted
SMOOTH = COUNTS * np.random.default_rng(1).uniform(0.5, 1.5, COUNTS.shape)  # no whole multiples
LOGNORM = np.log1p(normalise(COUNTS))

CASES = {
    "counts as float32": (COUNTS, "counts", "raw counts"),
    "counts as int16": (COUNTS.astype(np.int16), "counts", "raw counts"),
    "binarised": (COUNTS > 0, "counts", "raw counts"),
    "all cells empty": (np.zeros((3, 5)), "counts", "no value other than 0"),
    "counts downsampled to one library size": (
        np.random.default_rng(2).multinomial(997, np.full(GENES, 1 / GENES), CELLS),
        "counts",
        "raw counts",
    ),
    "estimated counts": (ESTIMATED, "counts", "of them whole"),
    "ambient-corrected counts": (CORRECTED, "counts", "counts with fractions"),
    "normalised to 10,000": (normalise(COUNTS), "normalized", "library size is 10,000"),
    "normalised to 1": (normalise(COUNTS, 1.0), "normalized", "library size is 1)"),
    "normalised, half of the genes": (normalise(COUNTS)[:, ::2], "normalized", "whole multiples"),
    "normalised fractions of reads": (normalise(SMOOTH), "normalized", "library size is 10,000"),
    "log-normalised": (LOGNORM, "lognorm", "library size is 10,000"),
    "log-normalised, float16": (LOGNORM.astype(np.float16), "lognorm", "natural logarithms"),
    "log-normalised, half of the genes": (LOGNORM[:, ::2], "lognorm", "whole multiples"),
    "log-normalised, one cell": (LOGNORM[:1], "lognorm", "whole multiples"),
    "log-normalised fractions of reads": (
        np.log1p(normalise(SMOOTH)),
        "lognorm",
        "library size is 10,000",
    ),
    "log-normalised fractions, half of the genes": (
        np.log1p(normalise(SMOOTH))[:, ::2],
        "lognorm",
        "fractions up to only",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kind_and_reason(case: str) -> None:
    matrix, kind, reason = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detected = detect_input(block_of(matrix), "a file")
    assert detected.kind == kind
    assert reason in detected.reason
    assert "\n" not in detected.reason


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    target=st.sampled_from([1e3, 1e4, 1e5, 1e6]),
    genes=st.sampled_from([1, 2, 3]),
)
def test_counts_are_told_from_their_logarithms(seed: int, target: float, genes: int) -> None:
    counts = draw_counts(seed)
    normalised = normalise(counts + (counts.sum(1, keepdims=True) == 0), target)[:, ::genes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputKindWarning)
        assert detect_input(block_of(counts[:, ::genes]), "x").kind == "counts"
        assert detect_input(block_of(normalised), "x").kind == "normalized"
        assert detect_input(block_of(np.log1p(normalised)), "x").kind == "lognorm"


def test_scanpys_bundled_data() -> None:
    """A log-normalised gene subset in raw, scaled data in X."""
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()
    detected = detect_input(block_of(sp.csr_matrix(adata.raw.X)), "pbmc68k_reduced")
    assert detected.kind == "lognorm"
    assert "natural logarithms" in detected.reason
    with pytest.raises(InputError, match="negative; scaled data are"):
        detect_input(block_of(adata.X), "pbmc68k_reduced")


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize("step", [1, 2], ids=["all genes", "half of the genes"])
@pytest.mark.parametrize("expected", ["auto", "counts", "lognorm"])
def test_other_bases_are_refused(base: int, step: int, expected: Expected) -> None:
    matrix = (np.log1p(normalise(COUNTS)) / np.log(base))[:, ::step]
    with pytest.raises(InputError, match=f"b.h5ad: found logarithms to base {base} "):
        detect_input(block_of(matrix), "b.h5ad", expected)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("log-normalised", "natural logarithms"),
        ("log-normalised, half of the genes", "natural logarithms"),
        ("log-normalised fractions, half of the genes", "log-normalised values"),
        ("normalised to 10,000", "normalised values, not logged"),
    ],
)
def test_counts_expected_but_not_found(case: str, found: str) -> None:
    with pytest.raises(InputError, match="raw counts were expected, but found") as error:
        detect_input(block_of(CASES[case][0]), "c.h5ad", "counts")
    for part in ("c.h5ad", found, "layer", "use_raw", '"auto"'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("counts as float32", "raw counts"),
        ("counts as int16", "raw counts"),
        ("ambient-corrected counts", "counts with fractions"),
        ("normalised to 10,000", "normalised values, not logged"),
        ("normalised to 1", "normalised values, not logged"),
    ],
)
def test_logarithms_expected_but_not_found(case: str, found: str) -> None:
    with pytest.raises(InputError, match="log-normalised values were expected") as error:
        detect_input(block_of(CASES[case][0]), "d.h5ad", "lognorm")
    for part in ("d.h5ad", found, "layer", "use_raw", '"auto"'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "case", ["counts as float32", "estimated counts", "ambient-corrected counts"]
)
def test_counts_expected_and_found(case: str) -> None:
    assert detect_input(block_of(CASES[case][0]), "x", "counts").kind == "counts"


def test_small_integers_are_what_the_user_says() -> None:
    """Rounded logarithms and very low counts look the same."""
    rounded = np.rint(LOGNORM)
    assert detect_input(block_of(rounded), "x").kind == "counts"
    assert detect_input(block_of(rounded), "x", "lognorm").kind == "lognorm"


@pytest.mark.parametrize("target", [1e6, 8e3])
def test_other_library_size_of_logarithms_is_a_warning(target: float) -> None:
    matrix = block_of(np.log1p(normalise(COUNTS, target)))
    with pytest.warns(InputKindWarning, match=f"e.zarr: .* {target:,.7g}, but .* 10,000"):
        assert detect_input(matrix, "e.zarr").kind == "lognorm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect_input(matrix, "e.zarr", target_sum=target)


@pytest.mark.parametrize("value", [-1.5, np.nan, np.inf, -np.inf])
def test_invalid_value_names_cell_and_gene(value: float) -> None:
    matrix = sp.csr_matrix(COUNTS)
    cell = 17
    entry = matrix.indptr[cell] + 5
    matrix.data[entry] = value
    column = matrix.indices[entry]
    names = [f"GENE{i}" for i in range(GENES)]
    with pytest.raises(InputError) as error:
        detect_input(block_of(matrix, start=1009), "f.h5ad", gene_names=names)
    for part in ("f.h5ad", f"cell {1009 + cell} ", f"GENE{column})", f"{value:.6g}"):
        assert part in str(error.value)


def test_values_that_are_no_numbers() -> None:
    one = np.array([0, 1]), np.array([0], np.int32)
    with pytest.raises(InputError, match=r"g\.h5ad: the matrix holds values of type complex128"):
        detect_input(CellBlock(0, *one, np.array([1j])), "g.h5ad")


def test_unknown_expectation() -> None:
    with pytest.raises(ValueError, match="auto, counts or lognorm"):
        detect_input(block_of(COUNTS), "x", "raw")  # type: ignore[arg-type]
