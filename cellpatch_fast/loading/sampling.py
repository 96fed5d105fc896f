"""The package's own sampler: the order of an epoch, cut into windows and batches.

All of it is arithmetic on positions. Nothing is read, so the order depends on the settings alone
and not on threads, memory or timing, and it can be tested as sets of numbers.

- In file order, an epoch is ``0, 1, 2, …``.
- Shuffled, the cells are cut into blocks of `Sampling.block_size` neighbours, which a disk can
  read at once, and the blocks are permuted. The order is then cut into windows of
  `Sampling.buffer_size` cells, and the cells of a window are permuted. Both permutations are
  seeded by the seed, the epoch and what they permute.
- With weights, a cell with the share w of all weight comes floor or ceil of w · cells times, so
  that an epoch has exactly as many cells as without (systematic resampling along the permuted
  blocks: each block stays a run of neighbours, and the disk notices nothing).
- The ranks of a distributed run take consecutive, equal parts of the order (their sizes differ
  by one cell at most), before windows are cut. All cells of an epoch thus come exactly once,
  whatever the world size. `Sampling.drop_last` makes the parts equal multiples of the batch.
- Or (`Sampling.share_batches`) the ranks take consecutive, equal parts of every batch. The batches
  are then those of a single process, so that training takes the same course on any number of
  devices; each rank reads the blocks that all of them need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import warn
from .sampler import Epoch, Window

WINDOW_CELLS = 1_024  # where the end of a window in file order is looked for, at first
BLOCKS, CELLS, PHASE = range(3)  # what a random number is for, so that no two are related


@dataclass(frozen=True)
class Sampling:
    """How an epoch is cut and ordered; a `Sampler`.

    Parameters
    ----------
    batch_size
        Cells per batch: all batches but the last have exactly so many, or at most so many where
        ``max_entries`` ends them earlier.
    max_entries
        Stored entries per batch at most; a cell that has more is a batch of its own. None for
        no limit.
    shuffle
        Whether cells come in random order instead of file order.
    block_size
        Neighbouring cells that stay together until they are in memory.
    buffer_size
        Cells that are mixed in memory, rounded up to whole batches.
    seed
        Of the order; an epoch's number changes it too.
    drop_last
        Leave out what does not fill a batch on every rank. Not together with ``max_entries``,
        where no batch is complete.
    rank, world_size
        Which part of each epoch this process takes.
    share_batches
        Whether that is a part of each batch, instead of some of the batches.
    weights
        float64 [cells that take part]: how often each comes, relative to the others. Needs
        ``shuffle``.

    Raises
    ------
    ValueError
        If a number makes no sense.
    """

    batch_size: int = 512
    max_entries: int | None = None
    shuffle: bool = False
    block_size: int = 64
    buffer_size: int = 8_192
    seed: int = 0
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    share_batches: bool = False
    weights: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_entries", "block_size", "buffer_size", "world_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not within 0 to {self.world_size - 1}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, found {self.seed}")
        if self.drop_last and self.max_entries is not None:
            raise ValueError(
                "drop_last and max_entries exclude each other: batches by entries have no full "
                "size. Leave one of them out"
            )
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: np.ndarray) -> None:
        if not self.shuffle:
            raise ValueError("weights need shuffle=True")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights must be finite, not negative, and not all 0")

    def windows(self, epoch: Epoch) -> Iterator[Window]:
        """The windows of this rank, in order."""
        order = _Order(self, epoch)
        windows = order.shuffled() if self.shuffle else order.in_order()
        return map(self._shared, windows)

    def batches_per_epoch(self, cells: int) -> int:
        """The number of batches of this rank.

        Raises
        ------
        TypeError
            If it depends on the cells, that is with ``max_entries``.
        """
        if self.max_entries is not None:
            raise TypeError("with max_entries the number of batches depends on the cells")
        first, last = self.part(cells)
        return -(-(last - first) // self.batch_size)

    def part(self, cells: int) -> tuple[int, int]:
        """The part of the order that this rank takes, or takes its parts of batches from."""
        rank, ranks = (0, 1) if self.share_batches else (self.rank, self.world_size)
        if self.drop_last:
            part = cells // (ranks * self.batch_size) * self.batch_size
            return rank * part, (rank + 1) * part
        return cells * rank // ranks, cells * (rank + 1) // ranks

    def _shared(self, window: Window) -> Window:
        """This rank's part of every batch, where batches are shared."""
        if not self.share_batches or self.world_size == 1:
            return window
        starts, sizes = window.cuts[:-1], np.diff(window.cuts)
        firsts, lasts = (
            starts + sizes * rank // self.world_size for rank in (self.rank, self.rank + 1)
        )
        return Window.of(
            [window.positions[first:last] for first, last in zip(firsts, lasts, strict=True)]
        )


class _Order:
    """The cells of one epoch in their order."""

    def __init__(self, sampling: Sampling, epoch: Epoch) -> None:
        self._sampling, self._epoch, self._cells = sampling, epoch, epoch.cells
        self._weights, self._phase = sampling.weights, 0.0
        self._order, self._ends, self._marks = self._blocks()
        self._first, self._last = sampling.part(epoch.cells)

    def in_order(self) -> Iterator[Window]:
        """Batches in file order, as many per window as stay within its entries."""
        size, window_entries = self._sampling.batch_size, self._epoch.window_entries
        reach = -(-WINDOW_CELLS // size) * size  # whole batches
        start = self._first
        while start < self._last:
            positions = np.arange(start, min(start + reach, self._last))
            offsets = np.concatenate([[0], np.cumsum(self._epoch.lengths(positions))])
            goes_on = start + reach < self._last
            if goes_on and offsets[-1] <= window_entries:
                reach *= 2  # to see where the window ends
                continue
            cuts = _cuts(offsets, size, self._sampling.max_entries)
            if goes_on and len(cuts) > 2:
                cuts = cuts[:-1]  # the last batch may go on beyond what was looked at
            full = int(np.searchsorted(offsets[cuts], window_entries, side="right")) - 1
            cuts = cuts[: max(full, 1) + 1]
            yield Window(positions[: cuts[-1]], cuts)
            start += int(cuts[-1])

    def shuffled(self) -> Iterator[Window]:
        sampling = self._sampling
        size = -(-sampling.buffer_size // sampling.batch_size) * sampling.batch_size
        for number, start in enumerate(range(self._first, self._last, size)):
            positions = self._ordered(start, min(start + size, self._last))
            rank = 0 if sampling.share_batches else sampling.rank
            positions = self._random(CELLS, rank, number).permutation(positions)
            offsets = np.concatenate([[0], np.cumsum(self._epoch.lengths(positions))])
            yield Window(positions, _cuts(offsets, sampling.batch_size, sampling.max_entries))

    def _blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The blocks in this epoch's order; after how many cells each ends; with weights, after
        how much weight (scaled to one unit per cell of the epoch, with a random phase)."""
        sampling, size = self._sampling, self._sampling.block_size
        if not sampling.shuffle:
            return np.empty(0, np.int64), np.empty(0, np.int64), None
        starts = np.arange(0, self._cells, size)
        order = self._random(BLOCKS).permutation(len(starts))
        if self._weights is None:
            return order, np.cumsum(np.minimum(size, self._cells - starts)[order]), None
        weights = np.add.reduceat(self._weights, starts)[order]
        self._phase = self._random(PHASE).random()
        marks = np.cumsum(weights) * (self._cells / weights.sum()) + self._phase
        ends = np.minimum(np.floor(marks).astype(np.int64), self._cells)
        ends[-1] = self._cells  # whatever was lost in rounding
        return order, ends, marks

    def _ordered(self, first: int, last: int) -> np.ndarray:
        """The positions ``first : last`` of the order of blocks."""
        begin = int(np.searchsorted(self._ends, first, side="right"))
        end = int(np.searchsorted(self._ends, last, side="left")) + 1
        blocks = [self._block(place) for place in range(begin, end)]
        before = int(self._ends[begin - 1]) if begin else 0
        return np.concatenate(blocks)[first - before : last - before]

    def _block(self, place: int) -> np.ndarray:
        """The positions of the ``place``-th block of the order, repeated by weight."""
        size = self._sampling.block_size
        start = int(self._order[place]) * size
        positions = np.arange(start, min(start + size, self._cells))
        if self._weights is None or self._marks is None:
            return positions
        low, before = (self._marks[place - 1], self._ends[place - 1]) if place else (self._phase, 0)
        share = np.cumsum(self._weights[positions])
        share /= max(share[-1], np.finfo(float).tiny)  # a block without weight has no cells
        ends = np.floor(low + share * (self._marks[place] - low)).astype(np.int64)
        ends = np.clip(ends, before, self._ends[place])
        ends[-1] = self._ends[place]
        counts = np.diff(ends, prepend=before)
        return np.repeat(positions, counts)

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._sampling.seed, self._epoch.number, *purpose])


def warn_of_unequal_batches(sampling: Sampling, cells: int) -> None:
    """Say so where ranks get unequal numbers of batches: those that wait for others hang then.

    Only the first rank does.
    """
    ranks = sampling.world_size
    if sampling.rank or ranks == 1 or sampling.share_batches:
        return
    if sampling.max_entries is not None:
        numbers = "numbers of batches that depend on their cells (max_entries), and can differ"
    else:
        counts = [replace(sampling, rank=r).batches_per_epoch(cells) for r in range(ranks)]
        if len(set(counts)) == 1:
            return
        most = counts.count(max(counts))
        numbers = (
            f"unequal numbers of batches: {most} of them {max(counts):,} per epoch, "
            f"{ranks - most} {min(counts):,}"
        )
    warn(
        f"the {ranks} ranks get {numbers}. Training that synchronises every batch waits for ever "
        "at the end of the epoch: share_batches=True gives all ranks the same number, and so does "
        "drop_last=True (with batches by cells)"
    )


def _cuts(offsets: np.ndarray, batch_size: int, max_entries: int | None) -> np.ndarray:
    """Where batches begin and end among cells with these ``offsets`` [cells + 1]."""
    cells = len(offsets) - 1
    if max_entries is None:
        return np.append(np.arange(0, cells, batch_size), cells)
    cuts = [0]
    while cuts[-1] < cells:
        start = cuts[-1]
        reach = int(np.searchsorted(offsets, offsets[start] + max_entries, side="right")) - 1
        cuts.append(min(max(reach, start + 1), start + batch_size, cells))
    return np.array(cuts)
