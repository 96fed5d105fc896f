"""Whether the cells that are read go on to hold what the matrix was found to hold.

What a matrix holds is told from some of its cells. Whatever else is in it shows while it is read:
the compiled pass of `tokens` says of every cell whether its values are whole and how large they
are, and cells that look out of place are looked at more closely, a few of each block. That costs
1 to 2 % of tokenising as long as nothing is out of place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import InputError
from .parts import remedy_of_mixture, take
from .scales import LARGEST_LOGARITHM, NATURAL, TELLING_GENES, VALUES, Look, look_at

if TYPE_CHECKING:
    from ..cells import CellBlock
    from .detection import Detected

LOOKED_AT = 32  # cells of a block, at most
CROWD, STRETCH = 16, 24  # so many of so many neighbours must be out of place where 5 % may be


class Sums(NamedTuple):
    """What the compiled pass says of cells, [cells] each."""

    lengths: np.ndarray  # stored entries
    libraries: np.ndarray  # the sum of them
    highest: np.ndarray
    whole: np.ndarray  # bool


class Expectation:
    """What cells hold according to those that were looked at before.

    Parameters
    ----------
    detected
        What they hold.
    name
        What to call the matrix in messages (its file).
    """

    def __init__(self, detected: Detected, name: str) -> None:
        self._detected, self._name = detected, name

    def check(self, block: CellBlock, rows: np.ndarray, sums: Sums) -> None:
        """Compare cells with it.

        Parameters
        ----------
        block
            Cells as they are stored.
        rows
            int64 [cells]: which of them.
        sums
            What they show.

        Raises
        ------
        InputError
            If some hold something else, saying which.
        """
        strange = self._strange(sums)
        if strange.any() and self._by_chance:
            strange = _crowded(rows, strange)
        if not strange.any():
            return
        rows = np.unique(rows[strange])
        step = -(-len(rows) // LOOKED_AT)
        look = look_at(take(block, rows[::step]))
        if self._contradicts(look):
            first, last = block.position(int(rows[0])), block.position(int(rows[-1]))
            cells = f"cell {first:,}" if first == last else f"cells from {first:,} to {last:,}"
            raise InputError(
                f"{self._name}: not all cells hold the same: found {look.reason} in {cells} (the "
                f"first is 0), but {self._detected.reason} in those looked at before. "
                f"{remedy_of_mixture([look])}"
            )

    def _strange(self, sums: Sums) -> np.ndarray:
        """bool [cells]: whether a cell is worth a closer look."""
        look, enough = self._detected.look, sums.lengths >= TELLING_GENES
        if self._detected.kind == "lognorm":
            most = LARGEST_LOGARITHM
            if look.evidence == "library":  # no gene of a cell can have more than that
                most = 1.01 * np.log1p(look.high_library)
            return (sums.whole & enough) | (sums.highest > most)
        if look.evidence == "integers":
            return ~sums.whole
        if look.evidence == "library":
            return enough & (np.abs(sums.libraries / look.high_library - 1) > 0.02)
        return ~sums.whole & (sums.highest < min(self._detected.low_highest, LARGEST_LOGARITHM))

    @property
    def _by_chance(self) -> bool:
        """Whether cells are strange that hold what they should: here and there, 5 %."""
        unlogged = self._detected.kind != "lognorm"
        return unlogged and self._detected.look.evidence not in ("integers", "library")

    def _contradicts(self, look: Look) -> bool:
        if look.evidence == "nothing":
            return False
        if self._detected.kind == "lognorm":
            unlogged = look.scale is VALUES and (look.certain or look.highest > LARGEST_LOGARITHM)
            other = look.certain and (look.scale is not NATURAL or look.evidence == "whole")
            return unlogged or other
        if self._detected.look.evidence == "integers":
            return look.scale is not VALUES
        return look.certain and look.scale is not VALUES


def _crowded(rows: np.ndarray, strange: np.ndarray) -> np.ndarray:
    """Those ``strange`` cells, bool [cells], that are a crowd: ``rows`` are their places."""
    order = np.argsort(rows, kind="stable")
    counts = np.concatenate([[0], np.cumsum(strange[order])])
    if len(counts) <= STRETCH:
        return np.zeros_like(strange)
    starts = np.flatnonzero(counts[STRETCH:] - counts[:-STRETCH] >= CROWD)
    crowded = np.zeros_like(strange)
    for offset in range(STRETCH):
        crowded[order[starts + offset]] = True
    return crowded & strange
