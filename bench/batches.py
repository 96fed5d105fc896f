"""Batches to measure kernels with: cells of given lengths, with real gene frequencies.

In a real cell of depth s a gene with mean m is detected with chance 1 - 1 / (1 + s·m / 2)^2
(`cellpatch_fast.synthetic.frequencies`). That is the chance that a waiting time ends before s,
which is (exp(E / 2) - 1) / (m / 2) with E exponential. A cell of exactly n genes is thus the n
genes whose times end first, and that is how cells are drawn here.

At most `DISTINCT` cells of a batch are drawn, the rest are repetitions: each has its own memory,
and tables see the same frequencies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.cells import GENES
from cellpatch_fast import RaggedCells
from cellpatch_fast.synthetic.frequencies import mean_counts

DISTINCT = 1024
AT_ONCE = 64  # cells drawn together; bounds memory
VALUES = 6  # integers 0 to 5, as rounding leaves them
CONSTANT_LENGTHS = (500, 1000, 2000, 4000, 8000, 16_000)
LONGEST = 60_000

Lengths = Callable[[int, np.random.Generator], np.ndarray]  # of so many cells


@dataclass(frozen=True)
class Case:
    """A kind of batch: how long its cells are, and how many entries or cells it has."""

    name: str
    lengths: Lengths
    cells: int | None = None  # None: as many as there are entries for
    uniform: bool = False  # all genes equally common, instead of real frequencies
    wide: bool = False  # scores up to ±100: the kernels must look for the highest first
    alone: bool = False  # ours only
    replayed: bool = False  # also from a CUDA graph
    main: bool = False  # the targets are about these
    toy: bool = False  # also when all that matters is that it runs


def constant(length: int) -> Lengths:
    return lambda cells, rng: np.full(cells, length)


def log_normal(cells: int, rng: np.random.Generator) -> np.ndarray:
    return 1500 * np.exp(0.6 * rng.standard_normal(cells))


def bimodal(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Four of five cells near 700 genes, the others near 5,000."""
    return np.where(rng.random(cells) < 0.8, 700, 5000) * np.exp(0.15 * rng.standard_normal(cells))


def one_long(cells: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([[LONGEST], np.full(cells - 1, 1000)])


CASES = (
    *(Case(f"{n:,}", constant(n), main=True, toy=n == 2000) for n in CONSTANT_LENGTHS),
    Case("log-normal", log_normal, main=True, toy=True),
    Case("bimodal", bimodal, main=True),
    Case("1,000, uniform genes", constant(1000), uniform=True, alone=True),
    Case("1,000, scores to ±100", constant(1000), wide=True, alone=True, toy=True),
    Case(f"1,000, one of {LONGEST:,}", one_long, alone=True),
    Case("1 cell × 20,000", constant(20_000), cells=1, replayed=True, toy=True),
    Case("65,536 cells × 100", constant(100), cells=65_536, replayed=True),
)


def chosen_cases(only: str | None, toy: bool) -> Iterator[Case]:
    """The cases whose names match; without a pattern all, or those for toys."""
    for case in CASES:
        if re.search(only, case.name) if only else case.toy or not toy:
            yield case


class Drawing:
    """Draws batches on a device.

    Parameters
    ----------
    entries
        Of a batch, about.
    genes
        Gene tokens run from 1 to this number.
    shorten
        Lengths are divided by this, and batches have two cells, where it is not 1.
    """

    def __init__(
        self, device: torch.device, entries: int, *, genes: int = GENES, shorten: int = 1
    ) -> None:
        self.device, self.entries, self.genes, self.shorten = device, entries, genes, shorten
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.rates = torch.from_numpy(mean_counts(genes) / 2).float().to(device)
        self.tokens = torch.randperm(genes, generator=self.generator, device=device) + 1

    def batch(self, case: Case) -> RaggedCells:
        """One batch of a case: genes uint16, values uint8."""
        if self.shorten == 1:
            mean = float(np.mean(case.lengths(10_000, self.rng)))
            cells = case.cells or max(1, int(self.entries / mean))
        else:
            cells = min(case.cells or 2, 2)
        distinct = min(cells, DISTINCT)
        lengths = case.lengths(distinct, self.rng) / self.shorten
        lengths = lengths.clip(1, self.genes).astype(np.int64)
        drawn = self.cells(lengths, uniform=case.uniform)
        # the first is not repeated: it may be the one long cell
        again = self.rng.integers(min(1, distinct - 1), distinct, cells - distinct)
        order = torch.from_numpy(np.concatenate([np.arange(distinct), again])).to(self.device)
        return drawn.take(order)

    def cells(self, lengths: np.ndarray, *, uniform: bool = False) -> RaggedCells:
        """Cells of exactly these lengths; tokens ascend within a cell."""
        parts = [
            self._tokens(torch.from_numpy(part).to(self.device), uniform)
            for part in np.array_split(lengths, math.ceil(len(lengths) / AT_ONCE))
        ]
        genes = torch.cat(parts)
        values = torch.randint(
            0, VALUES, genes.shape, dtype=torch.uint8, device=self.device, generator=self.generator
        )
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(self.device)
        return RaggedCells(offsets, genes.to(torch.uint16), values)

    def _tokens(self, lengths: Tensor, uniform: bool) -> Tensor:
        times = torch.empty(len(lengths), self.genes, device=self.device)
        times.exponential_(generator=self.generator)
        if not uniform:
            times.mul_(0.5).expm1_().div_(self.rates)
        longest = int(lengths.max())
        first = times.topk(longest, dim=1, largest=False).indices  # soonest first
        inside = torch.arange(longest, device=self.device) < lengths[:, None]
        beyond = self.genes + 1
        tokens = torch.where(inside, self.tokens[first], beyond).sort(1).values
        return tokens[tokens < beyond].int()


def draw_sets(drawing: Drawing, case: Case) -> list[RaggedCells]:
    """Batches that are together larger than the L2 cache; two at least, eight at most."""
    sets = [drawing.batch(case)]
    number = 2
    if drawing.device.type == "cuda":
        cache = torch.cuda.get_device_properties(drawing.device).L2_cache_size
        number = min(8, max(2, -(-4 * cache // batch_bytes(sets[0]))))
    return sets + [drawing.batch(case) for _ in range(number - 1)]


def batch_bytes(cells: RaggedCells) -> int:
    return cells.offsets.nbytes + cells.genes.nbytes + cells.values.nbytes
