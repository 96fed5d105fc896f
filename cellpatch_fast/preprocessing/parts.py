"""Whether all cells of a sample hold the same, and which cells hold what.

Cells of whole numbers and cells with fractions are looked at apart, and the latter in runs of
neighbours: matrices that were put together from several ones are so by runs of cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .scales import NATURAL, TELLING_GENES, VALUES, Look, look_at

if TYPE_CHECKING:
    from ..cells import CellBlock

ELSEWHERE = "Choose the raw counts with layer or use_raw"
USABLE = (VALUES, NATURAL)  # scales that the model can be given
RUNS = 8
RUN_CELLS = 16  # at least


@dataclass(frozen=True, eq=False)
class Part:
    """Some cells of a sample, and what they show.

    Parameters
    ----------
    cells
        int64 [cells]: their positions in the source, ascending.
    look
        What they show.
    """

    cells: np.ndarray
    look: Look

    @property
    def holds(self) -> str:
        """The same for parts that are treated alike."""
        if self.look.scale is VALUES:
            return "counts"
        return f"{self.look.scale.name}{' of raw counts' if self.look.evidence == 'whole' else ''}"


def look_at_parts(sample: CellBlock) -> list[Part]:
    """The parts of a sample that tell something; several that hold the same are possible."""
    offsets = np.concatenate([[0], np.cumsum(sample.data != 0)])[sample.indptr]
    broken = np.concatenate([[0], np.cumsum(sample.data != np.rint(sample.data))])[sample.indptr]
    enough = np.diff(offsets) >= TELLING_GENES
    whole = np.flatnonzero(enough & (np.diff(broken) == 0))
    fractional = np.flatnonzero(enough & (np.diff(broken) > 0))
    runs = np.array_split(fractional, max(1, min(RUNS, len(fractional) // RUN_CELLS)))
    parts = [_part(sample, rows) for rows in runs if len(rows)]
    parts = [part for part in parts if part.look.evidence != "nothing"]
    # Small fractions tell nothing where others show more, or are too large for logarithms.
    telling = [part for part in parts if part.look.certain or part.look.scale is VALUES]
    parts = telling or parts
    if any(part.look.evidence == "whole" and part.look.scale is not VALUES for part in parts):
        # Cells of few counts may be whole on such scales, too: that of 3 to base 2 is 2.
        whole = whole[highest_values(sample)[whole] > 3]
        whole = whole if len(whole) >= 3 else whole[:0]
    if len(whole):
        parts.append(_part(sample, whole))
    return sorted(parts, key=lambda part: int(part.cells[0]))


def where(parts: Sequence[Part], holds: str) -> str:
    """The cells that hold this, in words, as stretches between which others were looked at."""
    cells = np.concatenate([part.cells for part in parts])
    this = np.repeat([part.holds == holds for part in parts], [len(part.cells) for part in parts])
    order = np.argsort(cells)
    cells, this = cells[order], this[order]
    bounds = np.flatnonzero(np.diff(this, prepend=~this[:1])).tolist()
    stretches = [
        (int(cells[first]), int(cells[stop - 1]))
        for first, stop in zip(bounds, [*bounds[1:], len(cells)], strict=True)
        if this[first]
    ]
    texts = [f"{first:,} to {last:,}" for first, last in stretches[:3]]
    if len(stretches) > 3:
        texts[2] = f"{len(stretches) - 2:,} more stretches"
    return "cells " + (texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}")


def remedy_of_mixture(looks: Sequence[Look]) -> str:
    """What to do about cells that do not all hold the same."""
    remedy = f"{ELSEWHERE}, or read the cells as separate files."
    if all(look.scale in USABLE for look in looks):
        remedy += ' To take all as one kind, set input (--values) to "counts" or "lognorm".'
    return remedy


def take(block: CellBlock, rows: np.ndarray) -> CellBlock:
    """The ``rows`` of a block, int64 [cells], ascending."""
    lengths = np.diff(block.indptr)
    chosen = np.zeros(len(block), bool)
    chosen[rows] = True
    entries = np.repeat(chosen, lengths)
    return dataclasses.replace(
        block,
        indptr=np.concatenate([[0], np.cumsum(lengths[chosen])]),
        indices=block.indices[entries],
        data=block.data[entries],
        positions=np.array([block.position(int(row)) for row in np.flatnonzero(chosen)], np.int64),
    )


def highest_values(block: CellBlock) -> np.ndarray:
    """The highest value of each cell, float64 [cells]; 0 of an empty one."""
    highest = np.zeros(len(block))
    filled = np.diff(block.indptr) > 0
    if filled.any():
        highest[filled] = np.maximum.reduceat(block.data, block.indptr[:-1][filled])
    return highest


def _part(sample: CellBlock, rows: np.ndarray) -> Part:
    cells = take(sample, rows)
    assert cells.positions is not None
    return Part(cells.positions, look_at(cells))
