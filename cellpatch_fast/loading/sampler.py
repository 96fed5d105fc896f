"""What a sampler is: whoever says which cells come in which batch.

`Sampling` is the sampler of this package; any other that has the two methods of `Sampler` can be
handed to `CellLoader`. A sampler knows nothing of files: it deals with positions, counted from 0
among the cells that take part (`CellLoader`'s ``rows``; `Chosen` knows them).

A *window* is what the loader reads, decodes and holds as one piece; it consists of whole batches.
Cells that lie together in the files are read fastest when they are in one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

Lengths = Callable[[np.ndarray], np.ndarray]  # positions [cells] to stored entries [cells]


@dataclass(frozen=True, eq=False)
class Window:
    """Cells that are read together.

    Parameters
    ----------
    positions
        int64 [cells]: the cells in the order of the batches; a cell may come several times.
    cuts
        int64 [batches + 1]: batch ``b`` has the positions ``cuts[b] : cuts[b + 1]``.
    """

    positions: np.ndarray
    cuts: np.ndarray

    @classmethod
    def of(cls, batches: Sequence[np.ndarray]) -> Window:
        """The window of these batches, each the positions of its cells, int64 [cells]."""
        cuts = np.cumsum([0, *map(len, batches)])
        return cls(np.concatenate([np.empty(0, np.int64), *batches]), cuts)

    def batches(self) -> list[np.ndarray]:
        """The positions of each batch."""
        return [self.positions[start:stop] for start, stop in pairwise(self.cuts.tolist())]


@dataclass(frozen=True, eq=False)
class Epoch:
    """What a sampler is told of an epoch.

    Parameters
    ----------
    number
        Of the epoch, from 0.
    cells
        How many cells take part: their positions are below this.
    lengths
        The stored entries of cells: a function of positions, int64 [cells], that returns as many
        numbers.
    window_entries
        About the stored entries that a window should have, where nothing else says how large it
        should be.
    """

    number: int
    cells: int
    lengths: Lengths
    window_entries: int


class Sampler(Protocol):
    """Which cells come in which batch.

    Examples
    --------
    Batches of as many cells of each class, drawn with replacement:

    >>> import numpy as np
    >>> from cellpatch_fast.loading import CellLoader, Epoch, Window
    >>> class Balanced:
    ...     def __init__(self, classes, of_each, batches):
    ...         self.members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
    ...         self.of_each, self.batches = of_each, batches
    ...
    ...     def batches_per_epoch(self, cells):
    ...         return self.batches
    ...
    ...     def windows(self, epoch):
    ...         random = np.random.default_rng(epoch.number)
    ...         for _ in range(self.batches):
    ...             drawn = [random.choice(cells, self.of_each) for cells in self.members]
    ...             yield Window.of([np.concatenate(drawn)])
    >>> classes = np.array(["a", "b", "a", "a"])
    >>> loader = CellLoader("cells.h5ad", sampler=Balanced(classes, 8, 100))  # doctest: +SKIP
    """

    def windows(self, epoch: Epoch) -> Iterable[Window]:
        """The windows of an epoch, in order: the same whenever it is asked for the same epoch.

        It is asked for one window after the other, as memory allows.
        """

    def batches_per_epoch(self, cells: int) -> int:
        """The number of batches if so many cells take part.

        Raises
        ------
        TypeError
            If it is not known before.
        """


def checked_windows(
    windows: Iterable[Window], cells: int, first_batch: int = 0
) -> Iterator[Window]:
    """The windows of a sampler from a batch on.

    Raises
    ------
    ValueError
        If one is no window of so many cells.
    """
    for number, window in enumerate(windows):
        positions, cuts = window.positions, window.cuts
        if positions.ndim != 1 or positions.dtype != np.int64:
            raise ValueError(
                f"window {number} of the sampler has positions of type {positions.dtype} and shape "
                f"{list(positions.shape)}: they must be int64 of one dimension"
            )
        if len(cuts) == 0 or cuts[0] or cuts[-1] != len(positions) or (np.diff(cuts) < 0).any():
            raise ValueError(
                f"window {number} of the sampler has {len(positions)} positions, which its cuts "
                f"{cuts.tolist()} do not cut into batches: make it with Window.of"
            )
        if len(positions) and not 0 <= positions.min() <= positions.max() < cells:
            raise ValueError(
                f"window {number} of the sampler has positions {positions.min()} to "
                f"{positions.max()}, which are not within 0 to {cells - 1}"
            )
        batches = len(cuts) - 1
        if first_batch < batches:
            start = cuts[first_batch]
            yield Window(positions[start:], cuts[first_batch:] - start)
        first_batch = max(0, first_batch - batches)


class Chosen:
    """The rows that take part; their positions are counted from 0.

    Parameters
    ----------
    rows
        int64 rows, ascending and each once; or ranges ``[(start, stop), …]``, ascending; or None
        for all.
    total
        How many rows there are.

    Raises
    ------
    ValueError
        If the rows are not in order or not there.
    """

    def __init__(self, rows: np.ndarray | Sequence[tuple[int, int]] | None, total: int) -> None:
        ranges = np.array([[0, total]]) if rows is None else _ranges(np.asarray(rows))
        if (ranges[:, 0] >= ranges[:, 1]).any() or (ranges[1:, 0] < ranges[:-1, 1]).any():
            raise ValueError("rows must be ascending, and none may come twice")
        if len(ranges) and not 0 <= ranges[0, 0] <= ranges[-1, 1] <= total:
            raise ValueError(
                f"rows {ranges[0, 0]} to {ranges[-1, 1] - 1} are not within 0 to {total - 1}"
            )
        self._starts = ranges[:, 0]
        self._ends = np.cumsum(ranges[:, 1] - ranges[:, 0])  # positions

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """int64 [cells]: the rows at ``positions``."""
        if len(self._starts) == 1:
            return positions + self._starts[0]
        which = np.searchsorted(self._ends, positions, side="right")
        before = np.concatenate([[0], self._ends])[which]
        return positions - before + self._starts[which]


def _ranges(rows: np.ndarray) -> np.ndarray:
    """int64 [ranges, 2]: runs of rows that follow each other."""
    if rows.ndim == 2 and rows.shape[1] == 2:
        return rows.astype(np.int64)
    if rows.ndim != 1 or (rows.dtype.kind not in "iu" and len(rows)):
        raise ValueError(
            f"rows must be positions of cells or ranges of them, found {rows.dtype} "
            f"{list(rows.shape)}"
        )
    rows = rows.astype(np.int64)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], breaks])[: len(rows)].astype(np.int64)
    ends = np.concatenate([breaks, [len(rows)]])[: len(starts)].astype(np.int64)
    return np.stack([rows[starts], rows[ends - 1] + 1], axis=1)
