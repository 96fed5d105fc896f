"""The kind of a matrix is found from its values, or the matrix is refused with a way out."""

from __future__ import annotations

import re
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
    "normalised to one length": (
        COUNTS / np.sqrt(np.square(COUNTS).sum(1, keepdims=True)),
        "normalized",
        "whole multiples",
    ),
    "transcripts per million": (normalise(SMOOTH, 1e6), "normalized", "library size is 1,000,000"),
    "full-length reads": (np.rint(COUNTS * 173.3), "counts", "raw counts"),
    "counts with empty cells": (COUNTS * (np.arange(CELLS) % 5 > 1)[:, None], "counts", "raw"),
    "one cell, three genes": (np.array([[1.0, 0, 3]]), "counts", "raw counts"),
    "logarithms of one cell, three genes": (np.log1p([[2.3, 0, 5.1]]), "lognorm", "only"),
    "raw and normalised cells": (
        np.concatenate([COUNTS[:31], normalise(COUNTS)[31:]]),
        "normalized",  # which is handled as counts
        "whole multiples",
    ),
    "raw and corrected cells": (
        np.concatenate([COUNTS[:31], CORRECTED[31:]]),
        "counts",
        "counts",
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


def test_counts_that_look_like_logarithms_are_what_the_user_says() -> None:
    """Where nothing but the size of the values speaks against it."""
    shallow = block_of(np.minimum(SMOOTH, 7.9))
    with pytest.warns(InputKindWarning, match="x: found fractions up to only 7.9.*as requested"):
        assert detect_input(shallow, "x", "counts").kind == "counts"


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


TRANSFORMED = {
    "logarithms to base 2 of raw counts": (np.log2(COUNTS + 1), "2 ** X - 1"),
    "logarithms to base 10 of raw counts": (np.log10(COUNTS + 1), "10 ** X - 1"),
    "logarithms of logarithms of raw counts": (np.log1p(np.log1p(COUNTS)), "expm1"),
    "logarithms of logarithms of normalised counts": (np.log1p(LOGNORM), "expm1"),
    "square roots of raw counts": (np.sqrt(COUNTS), "X ** 2"),
    "square roots of normalised counts": (np.sqrt(normalise(COUNTS)), "X ** 2"),
}


@pytest.mark.parametrize("case", TRANSFORMED)
@pytest.mark.parametrize("step", [1, 2], ids=["all genes", "half of the genes"])
@pytest.mark.parametrize("expected", ["auto", "counts", "lognorm"])
def test_other_transformations_are_refused(case: str, step: int, expected: Expected) -> None:
    matrix, undoing = TRANSFORMED[case]
    with pytest.raises(InputError, match=f"h.h5ad: found {case}.*layer or use_raw") as error:
        detect_input(block_of(matrix.astype(np.float32)[:, ::step]), "h.h5ad", expected)
    assert f"undo the transformation: {undoing}" in str(error.value).replace("numpy.", "")


@pytest.mark.parametrize("step", [1, 2], ids=["all genes", "half of the genes"])
def test_logarithms_of_raw_counts_are_for_those_who_want_them(step: int) -> None:
    matrix = block_of(np.log1p(COUNTS)[:, ::step])
    found = "natural logarithms of raw counts, not normalised"
    with pytest.raises(
        InputError, match=f'i.h5ad: found {found}.*expm1.*input .--values. to "lognorm"'
    ):
        detect_input(matrix, "i.h5ad")
    with pytest.raises(InputError, match=f"raw counts were expected, but found {found}"):
        detect_input(matrix, "i.h5ad", "counts")
    with pytest.warns(InputKindWarning, match=r"i.h5ad: the logarithms are of raw counts"):
        assert detect_input(matrix, "i.h5ad", "lognorm").kind == "lognorm"


def test_logarithms_of_counts_sampled_to_one_library_size_are_normalised() -> None:
    sampled = np.random.default_rng(2).multinomial(997, np.full(GENES, 1 / GENES), CELLS)
    with pytest.warns(InputKindWarning, match="normalised to a library size of 997, but"):
        detected = detect_input(block_of(np.log1p(sampled)), "j")
    assert detected.kind == "lognorm"


def test_logarithms_per_million_of_some_genes_are_a_warning() -> None:
    matrix = block_of(np.log1p(normalise(COUNTS, 1e6))[:, ::2])
    with pytest.warns(InputKindWarning, match=r"library size of at least [\d,.]+, but .* 10,000"):
        assert detect_input(matrix, "k").kind == "lognorm"


def test_what_nothing_but_its_size_tells_is_a_warning() -> None:
    """Logarithms to which a correction of batches was added, say."""
    changed = LOGNORM * np.random.default_rng(3).uniform(0.6, 1.4, LOGNORM.shape)
    with pytest.warns(InputKindWarning, match='m: found fractions .* input .--values. to "lognor'):
        assert detect_input(block_of(changed), "m").kind == "lognorm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detect_input(block_of(changed), "m", "lognorm").kind == "lognorm"


@pytest.mark.parametrize("most", [10, np.inf])
def test_scaled_values_are_refused(most: float) -> None:
    """Divided by the standard deviation of their gene, not centred, perhaps clipped."""
    scaled = np.minimum(LOGNORM / (LOGNORM.std(0) + 1e-9), most)
    scaled[:, LOGNORM.std(0) == 0] = 0
    with pytest.raises(InputError, match=r"q.h5ad: found .* standard deviation is 1 in every gene"):
        detect_input(block_of(scaled), "q.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputKindWarning)
        assert detect_input(block_of(scaled), "q.h5ad", "counts").kind == "counts"


@pytest.mark.parametrize("seed", range(7))
def test_few_values_are_no_raw_counts_by_chance(seed: int) -> None:
    """Of cells with few counts some are nearly whole on some scale."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.1, (1_511, 37)) + (np.arange(37) == seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            matrix = np.log1p(normalise(counts))[:, seed % 2 :: step]
            assert detect_input(block_of(matrix), "r").kind == "lognorm"


MIXTURES = {
    "raw counts, then logarithms": (COUNTS, LOGNORM, "integers", "natural logarithms"),
    "logarithms, then raw counts": (LOGNORM, COUNTS, "natural logarithms", "integers"),
    "normalised, then logged": (normalise(COUNTS), LOGNORM, "not logged", "natural logarithms"),
    "corrected, then logged": (CORRECTED, LOGNORM, "with fractions", "natural logarithms"),
    "two bases": (LOGNORM, LOGNORM / np.float32(np.log(2)), "natural logarithms", "to base 2"),
    "logarithms, not all normalised": (LOGNORM, np.log1p(COUNTS), "normalised", "of raw counts"),
    "raw counts, then square roots": (COUNTS, np.sqrt(COUNTS), "integers", "square roots"),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_cells_that_do_not_all_hold_the_same_are_named(case: str) -> None:
    first, second, *shown = MIXTURES[case]
    matrix = block_of(np.concatenate([first, second]).astype(np.float32), start=1009)
    with pytest.raises(InputError, match="not all cells hold the same") as error:
        detect_input(matrix, "n.h5ad")
    message = str(error.value)
    assert message.startswith("n.h5ad: ")
    pattern = r"found (.*) in cells ([\d,]+) to ([\d,]+); (.*) in cells ([\d,]+) to"
    [(one, *places, other, change)] = re.findall(pattern, message)
    start, last, change = (int(place.replace(",", "")) for place in (*places, change))
    assert shown[0] in one
    assert shown[1] in other
    # Cells of whole numbers are told one by one; else a run of neighbours goes together.
    off = 0 if "integers" in shown else 17
    assert start == 1009
    assert abs(last - (1009 + CELLS - 1)) <= off
    assert change == last + 1
    for part in ("layer or use_raw", "separate files"):
        assert part in message


@pytest.mark.parametrize("expected", ["counts", "lognorm"])
def test_whoever_says_what_cells_hold_is_warned_and_obeyed(expected: Expected) -> None:
    matrix = block_of(np.concatenate([COUNTS, LOGNORM]))
    with pytest.warns(InputKindWarning, match=f"in cells 0 to .* taken as {expected}, as request"):
        assert detect_input(matrix, "o", expected).kind == expected


def test_what_was_seen_in_some_cells_is_said_of_these() -> None:
    detected = detect_input(block_of(COUNTS), "p", n_cells=10_007)
    assert detected.reason.endswith("raw counts (seen in 61 of 10,007 cells)")
    assert "seen in" not in detect_input(block_of(COUNTS), "p", n_cells=CELLS).reason


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
