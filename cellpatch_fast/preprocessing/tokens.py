"""From blocks of a cell x gene matrix to ragged cells: normalise, log, clip, round, drop zeros.

The paper's preprocessing, cell by cell in the fastest cache and without a dense or a logged copy
(some 280 million entries/s of ordered, known genes on one core at 2.5 GHz):

- A cell's library size is the float64 sum over *all* its entries, also those of genes that the
  vocabulary lacks. An entry's normalised count is the float64 product count · (target_sum /
  library size), its value the log1p of that.
- Discrete values need no logarithm. Rounding log1p(x) gives at least k exactly where
  x >= expm1(k - 1/2), and truncating where x >= expm1(k), so a value is the number of
  boundaries that the product reaches. The boundaries are computed to 50 digits and rounded up
  to the next float64: discrete values are those of the exact logarithm of the float64 product,
  the same on every machine. Half-way cases do not exist: exp of a rational number other than 0
  is irrational. (numpy.rint(numpy.log1p(x)) can differ in the last bits around a boundary,
  where the logarithm itself is rounded.)
- Continuous values are the logarithms that the C library returns, rounded to float32. C libraries
  differ in the last bit of a float64, which hardly ever reaches the float32.
- Values that are already logged are only clipped and rounded, half to even as numpy.rint does;
  there half-way cases exist, and the boundaries hold them too.
- Zeros, stored ones too, are no entries. An expressed gene whose value rounds to 0 is one.
- A cell's entries are ordered by token, then by value, whatever their order in the file. The
  encoder's sums follow that order, so a cell gets the same bits from CSR, CSC and dense files,
  and from files that list their genes differently. (Library sizes of whole counts up to 2^53
  are exact in any order; those of fractions may differ in the last bit.) See `ordering`.

A cell's result depends on that cell alone, so threads and blocks may divide the cells in any way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..cells import RaggedCells
from ..config import Preprocessing
from ..errors import InputError
from .blocks import floating_type, invalid_entry, readable_block
from .changes import Expectation, Sums
from .detection import InputKind
from .ordering import digit_bits
from .tokens_compiled import tokenize_cells

if TYPE_CHECKING:
    from ..cells import CellBlock


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Cells as tokens and values.

    Parameters
    ----------
    offsets
        int64 [cells + 1]: cell ``c`` has the entries ``offsets[c] : offsets[c + 1]``, ordered by
        gene, then by value. Cells without known genes keep their place.
    genes, values
        uint16 or int32, and uint8 (discrete) or float32 (continuous) [entries].
    unknown
        int64 [cells]: the non-zero entries of a cell that were left out because the vocabulary
        lacks their gene.
    """

    offsets: np.ndarray  # [c + 1]
    genes: np.ndarray  # [n]
    values: np.ndarray  # [n]
    unknown: np.ndarray  # [c]

    @property
    def unknown_entries(self) -> int:
        """Non-zero entries left out of all cells."""
        return int(self.unknown.sum())

    @property
    def empty_cells(self) -> int:
        return int((np.diff(self.offsets) == 0).sum())

    @property
    def cells(self) -> RaggedCells:
        arrays = (self.offsets, self.genes, self.values)
        return RaggedCells(*(torch.from_numpy(array) for array in arrays))


def token_types(preprocessing: Preprocessing, vocabulary_size: int) -> tuple[np.dtype, np.dtype]:
    """The types of genes and values."""
    genes = np.uint16 if vocabulary_size <= 1 << 16 else np.int32
    return np.dtype(genes), np.dtype(np.uint8 if preprocessing.discrete else np.float32)


def tokenize(
    block: CellBlock,
    tokens: np.ndarray,
    preprocessing: Preprocessing,
    kind: InputKind,
    vocabulary_size: int,
    name: str,
    gene_names: Sequence[str] | None = None,
    *,
    order: np.ndarray | None = None,
    into: tuple[np.ndarray, np.ndarray] | None = None,
    expectation: Expectation | None = None,
) -> Tokenized:
    """Turn a block of rows into ragged cells, in the calling thread and without the GIL.

    Parameters
    ----------
    block
        Rows in CSR form, with values of any integer, boolean or floating type.
    tokens
        int32 [genes]: the token of each column, -1 where the vocabulary lacks the gene.
    preprocessing
        How values are made.
    kind
        What the matrix holds, see `detect_input`.
    vocabulary_size
        The highest token plus one. It decides the type of the tokens: uint16 up to 65,536,
        int32 beyond.
    name
        What to call the matrix in messages (its file).
    gene_names
        Names of the columns, for messages.
    order
        int64 [cells]: rows of the block, in the order in which they become cells; one may come
        several times. By default all, as they are.
    into
        Arrays for genes and values, of the types of `token_types` and at least as long as the
        cells' entries in the block; new ones by default.
    expectation
        What the cells are compared with; by default they are taken as they are.

    Returns
    -------
    Tokenized
        Tokens and values, at the start of ``into``, and what was left out.

    Raises
    ------
    InputError
        If a value is negative, not a number or infinite, naming cell, gene and value; if a
        library size is too large or small to divide by; if the sparse matrix is damaged; if
        cells hold something else than expected.
    """
    block = readable_block(block, name)
    tokens = np.ascontiguousarray(tokens, dtype=np.int32)
    if len(tokens) and tokens.max() >= vocabulary_size:
        raise ValueError(f"token {tokens.max()} in a vocabulary of size {vocabulary_size}")
    floating = np.ascontiguousarray(block.data, floating_type(block.data.dtype))
    block = dataclasses.replace(block, data=floating)
    order = np.arange(len(block)) if order is None else order
    lengths = np.diff(block.indptr)[order]
    if into is None:
        types = token_types(preprocessing, vocabulary_size)
        into = np.empty(lengths.sum(), types[0]), np.empty(lengths.sum(), types[1])
    logged = kind == "lognorm"
    offsets, unknown = np.zeros(len(order) + 1, np.int64), np.empty(len(order), np.int64)
    libraries, highest = np.empty(len(order)), np.empty(len(order), floating.dtype)
    whole = np.empty(len(order), bool)
    longest = int(lengths.max(initial=0))
    refused = tokenize_cells(
        indptr=block.indptr,
        indices=block.indices,
        data=block.data,
        order=order,
        tokens=tokens,
        target_sum=preprocessing.target_sum,
        logged=logged,
        discrete=preprocessing.discrete,
        boundaries=_boundaries(preprocessing, logged) if preprocessing.discrete else np.empty(0),
        clip=math.inf if preprocessing.value_clip is None else preprocessing.value_clip,
        genes=into[0],
        values=into[1],
        offsets=offsets,
        unknown=unknown,
        libraries=libraries,
        highest=highest,
        whole=whole,
        longest=longest,
        digit=digit_bits(vocabulary_size),
    )
    if refused >= 0:
        raise _explain(block, int(order[refused]), len(tokens), name, gene_names)
    if expectation is not None:
        expectation.check(
            block, order, Sums(lengths=lengths, libraries=libraries, highest=highest, whole=whole)
        )
    genes, values = (array[: offsets[-1]] for array in into)
    return Tokenized(offsets, genes, values, unknown)


@lru_cache
def _boundaries(preprocessing: Preprocessing, logged: bool) -> np.ndarray:
    """float64 [largest value]: a value is the number of boundaries that its entry reaches."""
    assert preprocessing.value_clip is not None
    rounds = preprocessing.value_rounding == "round"
    largest = round(preprocessing.value_clip) if rounds else int(preprocessing.value_clip)
    boundaries = np.empty(largest)
    for value in range(1, largest + 1):
        boundary = value - 0.5 if rounds else float(value)
        if not logged:
            boundary = _expm1_rounded_up(boundary)
        elif rounds and value % 2:  # half-way between an even and this odd value: the even one
            boundary = math.nextafter(boundary, math.inf)
        boundaries[value - 1] = boundary
    return boundaries


def _expm1_rounded_up(x: float) -> float:
    """The smallest float64 that is not below the exact exp(x) - 1."""
    with localcontext() as context:
        context.prec = 150  # exp(255) has 111 digits before the point
        exact = Decimal(x).exp() - 1
        nearest = float(exact)
        return nearest if Decimal(nearest) >= exact else math.nextafter(nearest, math.inf)


def _explain(
    block: CellBlock, cell: int, columns: int, name: str, gene_names: Sequence[str] | None
) -> InputError:
    """Why the kernel refused a cell."""
    first, last = block.indptr[cell], block.indptr[cell + 1]
    row, indices = block.data[first:last], block.indices[first:last]
    outside = (indices < 0) | (indices >= columns)
    if outside.any():
        return InputError(
            f"{name}: cell {block.position(cell)} (the first is 0) has a value in gene column "
            f"{indices[outside][0]}, but there are only {columns} genes. The sparse matrix is "
            "damaged: write the file again."
        )
    wrong = np.flatnonzero(~((row >= 0) & (row < np.inf)))
    if len(wrong):
        return invalid_entry(block, int(first + wrong[0]), name, gene_names)
    return InputError(
        f"{name}: cell {block.position(cell)} (the first is 0) has a library size of "
        f"{sum(row.tolist()):.6g}, which cannot be normalised. Correct or remove this cell."
    )
