"""What the values of cells show: which scale they are on, and how that is seen.

Counts are transformed in few ways before they are stored: not at all, by a logarithm of some
base, twice by a logarithm, by a square root. Two properties survive whatever else is done to
counts, and each is looked for on every scale, that is in the values with that transformation
undone:

- *Counts are whole*, and normalised ones whole multiples: divided by the smallest value of its
  cell, every value is a whole number. Holds for any subset of genes; not for estimated or
  corrected counts, which have fractions.
- *Normalised cells have one library size.* Holds for any kind of count, unless genes were removed
  afterwards.

Where neither shows on any scale, what remains is that logarithms are small. Integers are always
taken as counts: logarithms rounded to integers look the same as a matrix of very low counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..cells import CellBlock

LARGEST_LOGARITHM = 20.0  # log2(1e6 + 1); natural logarithms of as much end at 13.8
LARGEST_NATURAL_LOGARITHM = 15.0
TELLING_ENTRIES = 300_000  # whole cells up to so many show the structure well enough
OFTEN = 20  # cells of a gene, and such genes, that tell how values of a gene vary
TELLING_COUNTS = 20  # of all cells, to be whole numbers
TELLING_GENES = 5  # of a cell, at least, for its library size or its values to tell anything

Evidence = Literal["integers", "whole", "library", "multiples", "size", "nothing"]


class Scale(NamedTuple):
    """A transformation of counts, and how to undo it."""

    name: str  # of the transformed values
    undo: Callable[[np.ndarray], np.ndarray]
    undoing: str  # the same, for people
    largest: float = LARGEST_LOGARITHM  # a value above it cannot be on this scale


VALUES = Scale("values", lambda x: x, "X", np.inf)
NATURAL = Scale("natural logarithms", np.expm1, "numpy.expm1(X)")
ROOTS = Scale("square roots", np.square, "X ** 2", np.inf)
SCALES = (
    VALUES,
    NATURAL,
    Scale("logarithms to base 2", lambda x: np.exp2(x) - 1, "2 ** X - 1"),
    Scale("logarithms to base 10", lambda x: 10.0**x - 1, "10 ** X - 1"),
    Scale(
        "logarithms of logarithms",
        lambda x: np.expm1(np.expm1(x)),
        "numpy.expm1(numpy.expm1(X))",
        float(np.log1p(LARGEST_LOGARITHM)),
    ),
    ROOTS,
)


@dataclass(frozen=True)
class Look:
    """What the values of some cells show, whatever the user expects.

    Parameters
    ----------
    scale
        The transformation of counts that they show.
    evidence
        How: nothing but ``"integers"``, mostly ``"whole"`` numbers, one ``"library"`` size,
        ``"multiples"`` of the smallest; only the ``"size"`` of the values, or ``"nothing"`` where
        there are too few to tell by more.
    highest
        The largest value.
    reason
        What is seen, in words.
    low_library, high_library
        Library sizes on that scale, of the genes that there are: of the cell that 5 % are below,
        and the largest.
    scaled
        Whether genes have one standard deviation, which tells that they were divided by it.
    """

    scale: Scale
    evidence: Evidence
    highest: float
    reason: str
    low_library: float = 0.0
    high_library: float = 0.0
    scaled: bool = False

    @property
    def certain(self) -> bool:
        """Whether more than the size of the values tells the scale."""
        return self.evidence not in ("size", "nothing")

    @property
    def normalized(self) -> bool:
        """Whether they show that they were normalised."""
        return self.evidence in ("library", "multiples")


def look_at(cells: CellBlock) -> Look:
    """Look at cells whose values are finite and not negative."""
    present = cells.data != 0
    values = cells.data[present].astype(np.float64)
    offsets = np.concatenate([[0], np.cumsum(present)])[cells.indptr]  # [c + 1]
    if not len(values):
        reason = f"no value other than 0 in {len(cells):,} cells: taken as raw counts"
        return Look(VALUES, "nothing", 0.0, reason)
    highest = float(values.max())
    whole = float(np.mean(values == np.rint(values)))
    if whole == 1:
        return Look(VALUES, "integers", highest, f"integers up to {highest:,.0f}: raw counts")
    precise = cells.data.dtype.itemsize > 2
    values, offsets = _thinned(values, offsets)
    structures = [
        (scale, _structure(values, scale, offsets, precise))
        for scale in SCALES
        if highest <= scale.largest
    ]
    # Whole numbers that have one sum are counts that were sampled to it: normalised ones.
    normalised = min(structure.spread for _, structure in structures) < 1e-3
    if not normalised and (look := _look_for_whole(structures[1:], highest)):
        return look
    if whole >= 0.5:  # estimated counts; scaled or logged ones are hardly ever whole
        reason = f"counts up to {highest:,.6g}, {whole:.0%} of them whole: raw counts"
        return Look(VALUES, "whole", highest, reason)
    look = _look_for_library(structures, highest) or _look_for_multiples(structures, highest)
    if look is None:
        look = _look_at_size(structures, highest)
        if _are_scaled(cells):
            reason = "fractions whose standard deviation is 1 in every gene: scaled values"
            look = replace(look, scaled=True, reason=reason)
    return look


def _are_scaled(cells: CellBlock) -> bool:
    """Whether nearly all genes that are seen often have a standard deviation of about 1."""
    values, genes = cells.data.astype(np.float64), cells.indices
    seen = np.bincount(genes[values != 0])
    often = seen >= max(OFTEN, 0.05 * len(cells))
    if often.sum() < OFTEN:
        return False
    mean = np.bincount(genes, values, len(seen))[often] / len(cells)
    variance = np.bincount(genes, values**2, len(seen))[often] / len(cells) - mean**2
    low, high = np.quantile(np.sqrt(np.maximum(variance, 0)), [0.1, 0.9])
    return bool(low > 0.75 and high < 1.33)


class _Structure(NamedTuple):
    """How well values fit "counts, possibly normalised"."""

    low_library: float  # 5 % of the cells have less
    library: float  # median
    high_library: float
    spread: float  # of the library sizes, relative; inf if there are too few cells to tell
    whole: float  # share of fractions that become whole; 0 if too few, or values below 1
    multiples: float  # share that are whole multiples of their cell's smallest; 0 if too few
    telling: int  # values that would show multiples


Structures = list[tuple[Scale, _Structure]]


def _look_for_whole(structures: Structures, highest: float) -> Look | None:
    """Raw counts on another scale than their own."""
    scale, best = max(structures, key=lambda item: item[1].whole)
    if best.whole < 0.95:
        return None
    return Look(scale, "whole", highest, f"{scale.name} of raw counts, not normalised")


def _look_for_library(structures: Structures, highest: float) -> Look | None:
    """One library size. Transformations of numbers near 0 are nearly linear, so that several
    scales may fit: the best one counts."""
    scale, best = min(structures, key=lambda item: item[1].spread)
    if best.spread >= 1e-3:
        return None
    if scale is ROOTS and structures[0][1].multiples >= 0.5:
        return None  # counts that were divided by their norm: their squares have one sum, too
    return _of_library(scale, best, highest)


def _look_for_multiples(structures: Structures, highest: float) -> Look | None:
    scale, best = max(structures, key=lambda item: item[1].multiples)
    if scale is ROOTS and structures[0][1].multiples >= 0.5 * best.multiples:
        scale, best = structures[0]  # squares of whole multiples are whole multiples, too
    if best.multiples < 0.5:
        return None
    reason = _normalised(scale, "each cell's values are whole multiples of its smallest")
    return Look(scale, "multiples", highest, reason, best.low_library, best.high_library)


def _look_at_size(structures: Structures, highest: float) -> Look:
    if highest > LARGEST_NATURAL_LOGARITHM:
        reason = f"fractions up to {highest:,.6g}, too large for logarithms: counts with fractions"
        return Look(VALUES, "size", highest, reason)
    reason = f"fractions up to only {highest:.4g}: log-normalised values"
    structure = dict(structures)[NATURAL]
    enough = structure.spread < np.inf and structure.telling >= 50
    evidence: Evidence = "size" if enough else "nothing"
    return Look(NATURAL, evidence, highest, reason, structure.low_library, structure.high_library)


def _of_library(scale: Scale, structure: _Structure, highest: float) -> Look:
    reason = _normalised(scale, f"every cell's library size is {structure.library:,.7g}")
    return Look(scale, "library", highest, reason, structure.library, structure.library)


def _normalised(scale: Scale, shows: str) -> str:
    if scale is VALUES:
        return f"normalised values, not logged ({shows})"
    return f"{scale.name} of normalised counts (before that, {shows})"


def _structure(stored: np.ndarray, scale: Scale, offsets: np.ndarray, precise: bool) -> _Structure:
    """`_Structure` of positive values [entries] of cells with ``offsets`` [cells + 1].

    Large numbers tell nothing, because rounding errors show there: early, unless the values were
    ``precise``.
    """
    values = scale.undo(stored)
    lengths = np.diff(offsets)
    starts, lengths = offsets[:-1][lengths > 0], lengths[lengths > 0]
    smallest = np.minimum.reduceat(values, starts)
    multiple = values / np.repeat(smallest, lengths)
    telling = multiple[(multiple > 1.5) & (multiple < (100 if precise else 3))]
    multiples = _share_whole(telling, 0.01) if len(telling) >= TELLING_GENES else 0.0
    counts = values[(values < (2_000 if precise else 8)) & (stored != np.rint(stored))]
    whole = 0.0
    if len(counts) >= TELLING_COUNTS and np.mean(smallest > 0.99) > 0.95:
        whole = _share_whole(counts, 5e-6 * (1 + counts) if precise else 0.02)
        if len(np.unique(np.rint(counts))) < (2 if precise else 3):  # whole by chance, perhaps
            whole = 0.0
    libraries = np.add.reduceat(values, starts)
    high = float(libraries.max())
    libraries = libraries[lengths >= TELLING_GENES]
    if len(libraries) < 3:
        return _Structure(0.0, 0.0, high, np.inf, whole, multiples, len(telling))
    low, library, most = map(float, np.quantile(libraries, [0.05, 0.5, 0.95]))
    return _Structure(low, library, high, (most - low) / library, whole, multiples, len(telling))


def _share_whole(values: np.ndarray, tolerance: float | np.ndarray) -> float:
    return float(np.mean(np.abs(values - np.rint(values)) < tolerance))


def _thinned(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every so many cells, as values [n] and offsets [c + 1], that are enough to tell."""
    step = max(1, -(-len(values) // TELLING_ENTRIES))
    if step == 1 or len(offsets) <= 2:
        return values, offsets
    lengths = np.diff(offsets)
    chosen = np.arange(len(lengths)) % step == 0
    return (
        values[np.repeat(chosen, lengths)],
        np.concatenate([[0], np.cumsum(lengths[chosen])]),
    )
