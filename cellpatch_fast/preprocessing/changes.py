"""Whether the cells that are read go on to hold what the matrix was found to hold.

What a matrix holds is told from some of its cells. Whatever else is in it shows while it is read:
the compiled pass of `tokens` says of every cell whether its values are whole and how large they
are, and cells that look out of place are looked at more closely, a few of each block. That costs
1 to 2 % of tokenising as long as nothing is out of place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .parts import remedy_of_mixture, take
from .scales import LARGEST_LOGARITHM, NATURAL, TELLING_GENES, VALUES, Look, look_at

if TYPE_CHECKING:
    from ..cells import CellBlock
    from .detection import Detected

LOOKED_AT = 32  # cells of a block, at most
MANY = 16  # cells that must be out of place where single ones may well be


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

    def check(
        self, block: CellBlock, rows: np.ndarray, highest: np.ndarray, whole: np.ndarray
    ) -> None:
        """Compare cells with it.

        Parameters
        ----------
        block
            Cells as they are stored.
        rows
            int64 [cells]: which of them.
        highest, whole
            [cells]: their highest value; whether their values are whole.

        Raises
        ------
        InputError
            If some hold something else, saying which.
        """
        strange = self._strange(np.diff(block.indptr)[rows], highest, whole)
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

    def _strange(self, lengths: np.ndarray, highest: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """bool [cells]: whether a cell is worth a closer look."""
        look = self._detected.look
        if self._detected.kind == "lognorm":
            most = LARGEST_LOGARITHM
            if look.evidence == "library":  # no gene of a cell can have more than that
                most = 1.01 * np.log1p(look.high_library)
            return (whole & (lengths >= TELLING_GENES)) | (highest > most)
        if look.evidence == "integers":
            return ~whole
        low = ~whole & (highest < min(self._detected.low_highest, LARGEST_LOGARITHM))
        if self._detected.kind == "normalized" and look.evidence == "library":
            low |= highest > 1.01 * look.high_library
        enough = low.sum() >= MANY and low.mean() > 0.25  # 5 % are to be expected
        return low if enough else np.zeros_like(low)

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
