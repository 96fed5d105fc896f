"""What generated cells are like: the numbers that one chooses, with their bounds.

The options of ``cellpatch synthetic-atlas`` are made from the class (`cli.fields`), so this module
imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..errors import InputError

MOST_GENES = 20_000  # as the median
MOST_TYPES, MOST_BATCHES, MOST_DONORS = 1_000, 100, 10_000
MARKER_RANKS = range(200, 6_000)  # from the most common gene on: those that can be markers


@dataclass(frozen=True)
class AtlasSettings:
    """What the cells of a generated atlas are like.

    Parameters
    ----------
    genes
        Median number of genes per cell, up to 20,000. Markers add some; no cell is expected to have
        above 25,000.
    spread
        Standard deviation of the logarithm of genes per cell, up to 2.
    cell_types
        Number of types in ``obs["cell_type"]``. The first is the most frequent.
    markers
        Marker genes of each type. They are ``marker_fold`` times as common there as elsewhere, and
        ``var["marker_of"]`` names the type.
    marker_fold
        How much more common a marker is in its type. The larger, the easier types are told apart.
    batches
        Number of batches in ``obs["batch"]``.
    donors
        Number of donors in ``obs["donor"]``, each in one batch; None for two in each batch.
    seed
        Of the cells. Genes, markers and batches are the same for all seeds.

    Raises
    ------
    InputError
        If a number is not within its bounds.
    """

    genes: int = 820  # with `spread`, as in 10x's PBMC 3k
    spread: float = 0.31
    cell_types: int = 10
    markers: int = 40
    marker_fold: float = 8.0
    batches: int = 4
    donors: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("genes", self.genes, 1, MOST_GENES)
        require_number("spread", self.spread, 0, 2, whole=False)
        require_number("cell_types", self.cell_types, 1, MOST_TYPES)
        require_number("markers", self.markers, 0, len(MARKER_RANKS) // self.cell_types)
        require_number("marker_fold", self.marker_fold, 1, 1_000, whole=False)
        require_number("batches", self.batches, 1, MOST_BATCHES)
        for name in ("spread", "marker_fold"):  # 1 and 1.0 are one setting
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.donors is None:
            object.__setattr__(self, "donors", 2 * self.batches)
        require_number("donors", self.donors, self.batches, MOST_DONORS)
        require_number("seed", self.seed, 0, 2**63 - 1)


def require_number(name: str, value: Any, least: float, most: float, *, whole: bool = True) -> None:
    """`InputError` if an argument is not a number in these bounds."""
    kind: Any = Integral if whole else Real  # NumPy's are too
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        expected = "a whole number" if whole else "a number"
        raise InputError(f"{name} must be {expected} from {least:,} to {most:,}, found {value!r}")
