"""From blocks of a cell x gene matrix to ragged cells: normalise, log, clip, round, drop zeros.

The paper's preprocessing, in one pass over the entries and without a dense or a logged copy:

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
  are exact in any order; those of fractions may differ in the last bit.) See `packing`.

A cell's result depends on that cell alone, so threads and blocks may divide the cells in any way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit

from .cells import RaggedCells
from .config import CellPatchConfig, ValueRounding
from .detect import (
    Detected,
    InputKind,
    InputKindWarning,
    detect_input,
    floating_type,
    invalid_entry,
    readable_block,
)
from .errors import InputError
from .kernels.threads import run_blocks
from .packing import pack_in_order

if TYPE_CHECKING:
    from .io.sources import CellBlock

__all__ = [
    "Detected",
    "InputKind",
    "InputKindWarning",
    "Preprocessing",
    "Tokenized",
    "detect_input",
    "tokenize",
]

CELLS_PER_TASK = 64  # some 0.1 to 1 ms of work between two tickets of a thread


@dataclass(frozen=True)
class Preprocessing:
    """How counts become values.

    Parameters
    ----------
    target_sum
        Library size after normalisation.
    value_clip
        Largest value after log1p; None for none, which only continuous values may have.
    value_rounding
        ``"round"`` (half to even) or ``"truncate"`` to integers, kept as uint8, or ``"none"``
        for continuous values, kept as float32.
    """

    target_sum: float = 1e4
    value_clip: float | None = 5.0
    value_rounding: ValueRounding = "round"

    def __post_init__(self) -> None:
        if not 0 < self.target_sum < math.inf:
            raise ValueError(f"target_sum must be positive, found {self.target_sum}")
        if self.value_rounding not in ("round", "truncate", "none"):
            raise ValueError(
                f"value_rounding must be round, truncate or none, found {self.value_rounding!r}"
            )
        clip = math.inf if self.value_clip is None else self.value_clip
        if not clip > 0 or (self.discrete and clip > 255):
            raise ValueError(
                "value_clip must be positive, and at most 255 for discrete values (uint8); "
                f"found {self.value_clip}"
            )

    @property
    def discrete(self) -> bool:
        return self.value_rounding != "none"

    @classmethod
    def from_config(cls, config: CellPatchConfig) -> Preprocessing:
        """The preprocessing that a model was made for."""
        return cls(config.target_sum, config.value_clip, config.value_rounding)


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The tokens of a block's cells, still where they lie in the block.

    Parameters
    ----------
    starts
        int64 [cells]: where a cell's entries start.
    lengths
        int64 [cells]: how many it has, with known genes. Empty cells keep their place.
    unknown
        int64 [cells]: its non-zero entries that were left out because the vocabulary lacks
        their gene.
    genes, values
        uint16 or int32, and uint8 (discrete) or float32 (continuous) [entries of the block].
    vocabulary_size
        The highest token plus one.
    """

    starts: np.ndarray  # [c]
    lengths: np.ndarray  # [c]
    unknown: np.ndarray  # [c]
    genes: np.ndarray  # [n]
    values: np.ndarray  # [n]
    vocabulary_size: int

    @property
    def unknown_entries(self) -> int:
        """Non-zero entries left out of all cells."""
        return int(self.unknown.sum())

    @property
    def empty_cells(self) -> int:
        return int((self.lengths == 0).sum())

    @property
    def cells(self) -> RaggedCells:
        """All cells in order, packed: each cell's entries ordered by gene, then by value."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # [c + 1]
        genes, values = (np.empty(offsets[-1], array.dtype) for array in (self.genes, self.values))
        self.pack(np.arange(len(self.lengths)), offsets[:-1], genes, values)
        return RaggedCells(*(torch.from_numpy(array) for array in (offsets, genes, values)))

    def pack(
        self, cells: np.ndarray, places: np.ndarray, genes: np.ndarray, values: np.ndarray
    ) -> None:
        """Write each of ``cells`` to where its place in ``genes`` and ``values`` starts."""
        pack_in_order(
            self.starts[cells],
            self.lengths[cells],
            self.genes,
            self.values,
            self.vocabulary_size,
            places=places,
            packed_genes=genes,
            packed_values=values,
        )


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
) -> Tokenized:
    """Turn a block of rows into ragged cells.

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

    Returns
    -------
    Tokenized
        Tokens and values, and what was left out; `Tokenized.cells` makes ragged cells of them.

    Raises
    ------
    InputError
        If a value is negative, not a number or infinite, naming cell, gene and value; if a
        library size is too large or small to divide by; if the sparse matrix is damaged.
    """
    block = readable_block(block, name)
    tokens = np.ascontiguousarray(tokens, dtype=np.int32)
    if len(tokens) and tokens.max() >= vocabulary_size:
        raise ValueError(f"token {tokens.max()} in a vocabulary of size {vocabulary_size}")
    cells, entries = len(block), len(block.data)
    given, floating = block.data, floating_type(block.data.dtype)
    if given.dtype != floating or not given.flags.c_contiguous:  # to be converted by the threads
        block = dataclasses.replace(block, data=np.empty(entries, floating))
    discrete, logged = preprocessing.discrete, kind == "lognorm"
    boundaries = _boundaries(preprocessing, logged) if discrete else np.empty(0)
    clip = math.inf if preprocessing.value_clip is None else preprocessing.value_clip

    # Every cell is compacted in place, where it lies in the block.
    types = token_types(preprocessing, vocabulary_size)
    genes, values = (np.empty(entries, dtype) for dtype in types)  # [n]
    kept, unknown = np.empty(cells, np.int64), np.empty(cells, np.int64)  # [c]

    def tokenize_range(start: int, stop: int) -> None:
        if block.data is not given:
            part = slice(block.indptr[start], block.indptr[stop])
            block.data[part] = given[part]
        _tokenize_cells(
            *(block.indptr, block.indices, block.data, tokens),
            *(preprocessing.target_sum, logged, discrete, boundaries, clip),
            *(genes, values, kept, unknown, start, stop),
        )

    run_blocks(tokenize_range, cells, CELLS_PER_TASK)
    refused = np.flatnonzero(kept < 0)
    if len(refused):
        raise _explain(block, int(refused[0]), len(tokens), name, gene_names)
    return Tokenized(block.indptr[:-1], kept, unknown, genes, values, vocabulary_size)


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


# Small loops over slices of one cell, each simple enough for the compiler to vectorise.


@njit(nogil=True, cache=True)
def _tokenize_cells(
    indptr: Any,  # [c + 1]
    indices: Any,  # [n]
    data: Any,  # [n]
    tokens: Any,  # [columns]
    target_sum: float,
    logged: bool,
    discrete: bool,
    boundaries: Any,  # [largest value]
    clip: float,
    genes: Any,  # [n], filled from each cell's first entry on
    values: Any,  # [n], likewise
    kept: Any,  # [c], -1 for a cell that is refused
    unknown: Any,  # [c]
    start: int,
    stop: int,
) -> None:
    for cell in range(start, stop):
        entries = slice(indptr[cell], indptr[cell + 1])
        row, columns, out = data[entries], indices[entries], values[entries]
        library, valid = _library_size(row, columns, len(tokens))
        scale = 1.0
        if not logged and library > 0:
            scale = target_sum / library
        if not (valid and library < np.inf and scale < np.inf):
            kept[cell] = -1
            continue
        if discrete:
            _count_boundaries(row, scale, boundaries, out)
        else:
            _clip_values(row, scale, logged, clip, out)
        kept[cell], unknown[cell] = _keep_known(row, columns, tokens, genes[entries], out)


@njit(nogil=True, cache=True)
def _library_size(row: Any, columns: Any, genes: int) -> tuple[float, bool]:
    """The sum of a cell, and whether no entry is negative or of a column that does not exist.

    One entry that is infinite or not a number shows in the sum. Summed in the order of the
    entries, whatever the machine's vector width.
    """
    library = 0.0
    wrong = 0
    for entry in range(len(row)):
        library += row[entry]
        wrong += (row[entry] < 0) | (np.uint64(columns[entry]) >= np.uint64(genes))
    return library, wrong == 0


@njit(nogil=True, cache=True)
def _count_boundaries(row: Any, scale: float, boundaries: Any, out: Any) -> None:
    out[:] = 0
    for boundary in boundaries:
        for entry in range(len(row)):
            out[entry] += row[entry] * scale >= boundary


@njit(nogil=True, cache=True)
def _clip_values(row: Any, scale: float, logged: bool, clip: float, out: Any) -> None:
    for entry in range(len(row)):
        value = row[entry] * scale
        out[entry] = min(value if logged else math.log1p(value), clip)


@njit(nogil=True, cache=True)
def _keep_known(row: Any, columns: Any, tokens: Any, genes: Any, values: Any) -> tuple[int, int]:
    """Move the non-zero entries of known genes to the front; how many they are, and the others."""
    kept = 0
    present = 0
    for entry in range(len(row)):
        token = tokens[columns[entry]]
        genes[kept] = token  # overwritten by the next entry unless this one is kept
        values[kept] = values[entry]
        present += row[entry] != 0
        kept += (row[entry] != 0) & (token >= 0)
    return kept, present - kept


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
