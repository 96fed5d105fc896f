"""What a matrix holds: raw counts, normalised values or logarithms, or nothing usable.

The model was trained on log1p of counts per ten thousand. Logging a matrix twice, or not at
all, gives embeddings that look fine and mean nothing, so the kind of a matrix is inferred from
its values before anything is computed, a wrong expectation is refused, and the reason of each
decision is one line for the log.

Two properties survive everything that is usually done to counts, and each is looked for in the
values as they are and in their anti-logarithms to the bases e, 2 and 10:

- *Normalised cells have one library size.* Holds for any kind of count, unless genes were
  removed afterwards.
- *Counts are whole multiples of one.* Divided by the smallest value of its cell, every value is
  a whole number. Holds for any subset of genes; not for estimated counts (fractions of reads).

Where neither shows, what remains is that logarithms are small. Integers are always taken as
counts: logarithms rounded to integers look the same as a matrix of very low counts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..config import Expected
from ..errors import InputError, InputWarning

if TYPE_CHECKING:
    from ..cells import CellBlock

__all__ = [
    "Detected",
    "InputKind",
    "InputKindWarning",
    "detect_input",
    "floating_type",
    "invalid_entry",
    "readable_block",
]

InputKind = Literal["counts", "normalized", "lognorm"]

LARGEST_LOGARITHM = 20.0  # log2(1e6 + 1); natural logarithms of as much end at 13.8
LARGEST_NATURAL_LOGARITHM = 15.0
TELLING_ENTRIES = 500_000  # whole cells up to so many show the structure well enough
BASES = {"natural logarithms": np.e, "logarithms to base 2": 2.0, "logarithms to base 10": 10.0}


class InputKindWarning(InputWarning):
    """A matrix is usable, but not quite what the model expects."""


@dataclass(frozen=True)
class Detected:
    """The kind of a matrix, and in one line how it shows."""

    kind: InputKind
    reason: str


def detect_input(
    sample: CellBlock,
    name: str,
    expected: Expected = "auto",
    *,
    target_sum: float = 1e4,
    gene_names: Sequence[str] | None = None,
) -> Detected:
    """Tell raw counts, normalised values and log-normalised values apart.

    Parameters
    ----------
    sample
        Some cells of the matrix; a thousand are plenty.
    name
        What to call the matrix in messages (its file).
    expected
        What the user says it holds: ``"counts"`` (raw), ``"lognorm"`` (natural log1p of
        normalised counts), or ``"auto"``, which takes whatever is found.
    target_sum
        The library size that the model expects.
    gene_names
        Names of the columns, for messages.

    Returns
    -------
    Detected
        ``"counts"`` (integers, or counts with fractions), ``"normalized"`` (scaled to one
        library size, not logged: handled exactly as counts, because normalising once more only
        changes the common library size) or ``"lognorm"`` (already logged: clip and round only).

    Raises
    ------
    InputError
        If values are negative, not a number or infinite, are logarithms to a base other than e,
        or contradict ``expected``.

    Warns
    -----
    InputKindWarning
        If log-normalised cells have a library size more than 1 % off ``target_sum``.
    """
    if expected not in ("auto", "counts", "lognorm"):
        raise ValueError(f"input must be auto, counts or lognorm, found {expected!r}")
    sample = readable_block(sample, name)
    wrong = np.flatnonzero(~((sample.data >= 0) & (sample.data < np.inf)))
    if len(wrong):
        raise invalid_entry(sample, int(wrong[0]), name, gene_names)

    found = _find(sample)
    if found.kind == "other logarithm":
        raise InputError(
            f"{name}: found {found.reason}, but the model needs natural ones. Choose the raw "
            "counts with layer or use_raw, or convert the matrix (multiply by ln 2 or ln 10)."
        )
    if expected == "counts" and found.kind != "counts":
        raise InputError(
            f"{name}: raw counts were expected, but found {found.reason}. Choose the raw counts "
            'with layer or use_raw, or set input to "auto" to use the matrix as what it is.'
        )
    if expected == "lognorm" and found.kind != "lognorm" and found.highest > LARGEST_LOGARITHM:
        raise _not_logged(name, found)
    if expected == "lognorm" and found.kind == "normalized":
        raise _not_logged(name, found)
    if expected == "lognorm" and found.kind == "counts":
        return Detected("lognorm", f"{found.reason}; taken as logarithms, as requested")

    off_target = found.library is not None and abs(found.library / target_sum - 1) > 0.01
    if found.kind == "lognorm" and off_target:
        warnings.warn(
            f"{name}: the cells were normalised to a library size of {found.library:,.7g}, but "
            f"the model expects {target_sum:,.7g}. Raw counts (layer or use_raw) would be "
            "normalised to that.",
            InputKindWarning,
            stacklevel=2,
        )
    return Detected(found.kind, found.reason)


def _not_logged(name: str, found: _Found) -> InputError:
    return InputError(
        f"{name}: log-normalised values were expected, but found {found.reason}. Set input to "
        '"auto", which normalises and logs them, or choose the log-normalised matrix with layer '
        "or use_raw."
    )


class _Found(NamedTuple):
    """What the values show, whatever the user expects."""

    kind: Literal["counts", "normalized", "lognorm", "other logarithm"]
    reason: str
    highest: float = 0.0
    library: float | None = None  # where all cells have the same


def _find(sample: CellBlock) -> _Found:
    present = sample.data != 0
    values = sample.data[present].astype(np.float64)
    entries = np.concatenate([[0], np.cumsum(present)])[sample.indptr]  # [c + 1]
    cells = len(entries) - 1
    if not len(values):
        return _Found("counts", f"no value other than 0 in {cells:,} cells: taken as raw counts")
    highest = float(values.max())
    whole = float(np.mean(values == np.rint(values)))
    if whole == 1:
        return _Found("counts", f"integers up to {highest:,.0f}: raw counts", highest)
    if whole >= 0.5:  # estimated counts; scaled or logged ones are hardly ever whole
        reason = f"counts up to {highest:,.6g}, {whole:.0%} of them whole: raw counts"
        return _Found("counts", reason, highest)

    enough = max(1, int(np.searchsorted(entries, TELLING_ENTRIES, side="right")) - 1)  # cells
    entries = entries[: enough + 1]
    values = values[: entries[-1]]
    structure = [("values", _structure(values, entries))]
    if highest <= LARGEST_LOGARITHM:
        structure += [
            (scale, _structure(np.expm1(values * np.log(base)), entries))
            for scale, base in BASES.items()
        ]
    # Powers of numbers near 0 are nearly linear, so several scales may fit: the best one counts.
    scale, best = min(structure, key=lambda item: item[1].spread)
    library: float | None = best.library
    if best.spread < 1e-3:
        shows = f"every cell's library size is {best.library:,.7g}"
    else:
        scale, best = max(structure, key=lambda item: item[1].multiples)
        library = None
        shows = "each cell's values are whole multiples of its smallest"
        if best.multiples < 0.5:
            return _find_by_size(highest)
    if scale == "values":
        return _Found("normalized", f"normalised values, not logged ({shows})", highest, library)
    kind = "lognorm" if BASES[scale] == np.e else "other logarithm"
    reason = f"{scale} of normalised counts (before the logarithm, {shows})"
    return _Found(kind, reason, highest, library)  # type: ignore[arg-type]


def _find_by_size(highest: float) -> _Found:
    if highest <= LARGEST_NATURAL_LOGARITHM:
        reason = f"fractions up to only {highest:.4g}: log-normalised values"
        return _Found("lognorm", reason, highest)
    reason = f"fractions up to {highest:,.6g}, too large for logarithms: counts with fractions"
    return _Found("counts", reason, highest)


class _Structure(NamedTuple):
    """How well values fit "counts, possibly normalised"."""

    library: float  # median library size
    spread: float  # of the library sizes, relative; inf if there are too few cells to tell
    multiples: float  # share of values that are whole multiples of their cell's smallest


def _structure(values: np.ndarray, offsets: np.ndarray) -> _Structure:
    """`_Structure` of positive values [entries] of cells with ``offsets`` [cells + 1]."""
    lengths = np.diff(offsets)
    starts, lengths = offsets[:-1][lengths > 0], lengths[lengths > 0]
    multiple = values / np.repeat(np.minimum.reduceat(values, starts), lengths)
    telling = multiple[(multiple > 1.5) & (multiple < 100)]  # beyond 100 rounding errors show
    whole = np.abs(telling - np.rint(telling)) < 0.01
    multiples = float(whole.mean()) if len(telling) >= 5 else 0.0

    libraries = np.add.reduceat(values, starts)[lengths >= 5]
    if len(libraries) < 3:
        return _Structure(0.0, np.inf, multiples)
    low, library, high = np.quantile(libraries, [0.05, 0.5, 0.95])
    return _Structure(float(library), float((high - low) / library), multiples)


def readable_block(block: CellBlock, name: str) -> CellBlock:
    """``block`` with int64 row pointers and int32, int64 or uint16 indices; its data stay.

    Raises
    ------
    InputError
        If the values are not numbers, or the three arrays do not fit together.
    """
    data, indptr, indices = (np.asarray(x) for x in (block.data, block.indptr, block.indices))
    if data.dtype.kind not in "buif":
        raise InputError(f"{name}: the matrix holds values of type {data.dtype}, not numbers.")
    if (
        len(indptr) == 0
        or indptr[0] != 0
        or (np.diff(indptr) < 0).any()
        or not indptr[-1] == len(indices) == len(data)
    ):
        raise InputError(
            f"{name}: the sparse matrix is damaged near cell {block.start}: its row pointers do "
            "not fit its values. Write the file again."
        )
    if indices.dtype.kind == "u" and indices.dtype.itemsize >= 4:
        indices = indices.view(f"{indices.dtype.byteorder}i{indices.dtype.itemsize}")
    wide = np.dtype(np.int64) if indices.dtype.itemsize == 8 else np.dtype(np.int32)
    if indices.dtype == np.uint16:  # as files of fewer genes may store them: half to read
        wide = indices.dtype
    return dataclasses.replace(
        block,
        indptr=np.ascontiguousarray(indptr, dtype=np.int64),
        indices=np.ascontiguousarray(indices, dtype=wide),
        data=data,
    )


def floating_type(dtype: np.dtype) -> np.dtype:
    """The type that values of a number type are computed in: float32 or float64.

    It holds them exactly, except that integers beyond 2^53 are rounded to float64.
    """
    floating = np.promote_types(dtype, np.float32)
    return np.dtype(np.float64) if floating.itemsize > 8 else floating


def invalid_entry(
    block: CellBlock, entry: int, name: str, gene_names: Sequence[str] | None
) -> InputError:
    """The error that says what is wrong with one entry of a block, and in which cell and gene."""
    cell = block.position(int(np.searchsorted(block.indptr, entry, side="right")) - 1)
    column, value = int(block.indices[entry]), float(block.data[entry])
    gene = f"gene column {column}"
    if gene_names is not None and 0 <= column < len(gene_names):
        gene += f" ({gene_names[column]})"
    found = f"{name}: cell {cell} (the first is 0), {gene}: the value is {value:.6g}"
    if value < 0:
        return InputError(
            f"{found}. Counts and their logarithms are never negative; scaled data are. Choose "
            "the raw counts with layer or use_raw."
        )
    return InputError(
        f"{found}, which is not a finite number. Correct or remove this cell, or choose another "
        "matrix with layer or use_raw."
    )
