"""Which cells come in which batch: the order of an epoch, cut into windows and batches.

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

A *window* is what the loader reads, decodes and holds as one piece; it consists of whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import warn

Lengths = Callable[[np.ndarray], np.ndarray]  # positions [cells] to stored entries [cells]

WINDOW_CELLS = 1_024  # where the end of a window in file order is looked for, at first
BLOCKS, CELLS, PHASE = range(3)  # what a random number is for, so that no two are related


@dataclass(frozen=True)
class Sampling:
    """How an epoch is cut and ordered.

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


@dataclass(frozen=True, eq=False)
class Window:
    """Cells that are read together.

    Parameters
    ----------
    positions
        int64 [cells]: the cells in the order of the batches.
    cuts
        int64 [batches + 1]: batch ``b`` has the positions ``cuts[b] : cuts[b + 1]``.
    """

    positions: np.ndarray
    cuts: np.ndarray


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


class Epoch:
    """The cells of one epoch that one rank sees.

    Parameters
    ----------
    sampling
        How it is cut and ordered.
    lengths
        Positions to stored entries: a function of an int64 array that returns one.
    cells
        How many cells there are.
    number
        Of the epoch, from 0.
    weights
        float64 [cells], not negative: how often a cell comes, relative to the others. Needs
        ``sampling.shuffle``.
    """

    def __init__(
        self,
        sampling: Sampling,
        lengths: Lengths,
        cells: int,
        number: int = 0,
        weights: np.ndarray | None = None,
    ) -> None:
        self._sampling, self._lengths, self._cells, self._number = sampling, lengths, cells, number
        self._weights = weights
        self._phase = 0.0
        self._order, self._ends, self._marks = self._blocks()
        self._first, self._last = _part(sampling, cells)

    def __len__(self) -> int:
        """Cells of this rank, or of all ranks where they share batches."""
        return self._last - self._first

    def windows(self, window_entries: int, first_batch: int = 0) -> Iterator[Window]:
        """The windows, in order, from a batch on.

        Parameters
        ----------
        window_entries
            About the entries of a window; matters in file order only.
        first_batch
            Batches to leave out at the beginning.
        """
        windows = self._shuffled() if self._sampling.shuffle else self._in_order(window_entries)
        for window in windows:
            batches = len(window.cuts) - 1
            if first_batch < batches:
                yield self._shared(_from_batch(window, first_batch))
            first_batch = max(0, first_batch - batches)

    def _shared(self, window: Window) -> Window:
        """This rank's part of every batch, where batches are shared."""
        sampling = self._sampling
        if not sampling.share_batches or sampling.world_size == 1:
            return window
        starts, sizes = window.cuts[:-1], np.diff(window.cuts)
        firsts, lasts = (
            starts + sizes * rank // sampling.world_size
            for rank in (sampling.rank, sampling.rank + 1)
        )
        parts = [window.positions[i:j] for i, j in zip(firsts, lasts, strict=True)]
        cuts = np.concatenate([[0], np.cumsum(lasts - firsts)])
        return Window(np.concatenate(parts), cuts)

    def _in_order(self, window_entries: int) -> Iterator[Window]:
        """Batches in file order, as many per window as stay within ``window_entries``."""
        size = self._sampling.batch_size
        reach = -(-WINDOW_CELLS // size) * size  # whole batches
        start = self._first
        while start < self._last:
            positions = np.arange(start, min(start + reach, self._last))
            offsets = np.concatenate([[0], np.cumsum(self._lengths(positions))])
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

    def _shuffled(self) -> Iterator[Window]:
        sampling = self._sampling
        size = -(-sampling.buffer_size // sampling.batch_size) * sampling.batch_size
        for number, start in enumerate(range(self._first, self._last, size)):
            positions = self._ordered(start, min(start + size, self._last))
            rank = 0 if sampling.share_batches else sampling.rank
            positions = self._random(CELLS, rank, number).permutation(positions)
            offsets = np.concatenate([[0], np.cumsum(self._lengths(positions))])
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
        return np.random.default_rng([self._sampling.seed, self._number, *purpose])


def batches_per_epoch(sampling: Sampling, cells: int) -> int:
    """The number of batches of this rank.

    Raises
    ------
    TypeError
        If it depends on the cells, that is with ``max_entries``.
    """
    if sampling.max_entries is not None:
        raise TypeError("with max_entries the number of batches depends on the cells")
    first, last = _part(sampling, cells)
    return -(-(last - first) // sampling.batch_size)


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
        counts = [batches_per_epoch(replace(sampling, rank=r), cells) for r in range(ranks)]
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


def _part(sampling: Sampling, cells: int) -> tuple[int, int]:
    """The part of the order that this rank takes, or takes its parts of batches from."""
    rank, ranks = sampling.rank, sampling.world_size
    if sampling.share_batches:
        rank, ranks = 0, 1
    if sampling.drop_last:
        part = cells // (ranks * sampling.batch_size) * sampling.batch_size
        return rank * part, (rank + 1) * part
    return cells * rank // ranks, cells * (rank + 1) // ranks


def _from_batch(window: Window, first: int) -> Window:
    """The window without its first batches."""
    return Window(window.positions[window.cuts[first] :], window.cuts[first:] - window.cuts[first])


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
