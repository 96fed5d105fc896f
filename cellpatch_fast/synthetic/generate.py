"""Generated atlases: cells as real as measuring and trying things out needs, in any number.

Gene frequencies, counts and genes per cell are fitted to 10x's PBMC 3k, see `frequencies`: the
r-th most common gene has a mean of about 248 / (r + 4.7) · exp(-(r / 8860)^2.5), Zipf's law with a
cut-off, plus some 90 housekeeping genes (a root mean square error of 3.3 % over four decades).
Counts are negative binomial, genes per cell log-normal.

What is made up: which genes are common (ribosomal and mitochondrial ones, then mostly
protein-coding ones), cell types (each has marker genes; the t-th type has a share proportional to
1 / t), donors, and batches (each captures every gene with an efficiency of its own). None of that
depends on the seed: atlases with different seeds are different cells of the same kinds.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..devices import usable_cores
from ..files import made_whole
from ..genes.names import human_genes
from ..progress import progress_bar
from .frequencies import depths, mean_counts
from .settings import MARKER_RANKS, AtlasSettings, require_number
from .writer import AnnDataWriter, require_writable

if TYPE_CHECKING:
    import pandas as pd

    from .cells_compiled import Law

__all__ = ["SyntheticAtlas", "synthetic_atlas"]

LONGEST = 25_000  # genes expected of any cell
MOST_CELLS = 10**12
HOUSEKEEPING = re.compile(r"RP[LS]\d+[AXYL]?|RPLP[012]|RPSA|MT-(CO|ND|ATP)\d|MT-(CYB|ND4L)")
WEIGHTS = {"protein_coding": 1.0, "lncRNA": 0.05}  # how soon a biotype is among the common genes
OTHER_WEIGHT = 0.005
LOST = 0.3  # spread of the logarithm of a batch's efficiencies
SIMILAR = 2**0.25  # by how much means differ within a stretch of ranks
BLOCK_ENTRIES = 1 << 20  # that are drawn together, about
MOST_THREADS = 8  # one writes
MOST_ENTRIES = 2**31  # of a matrix whose offsets have 32 bits


@dataclass(frozen=True)
class SyntheticAtlas:
    """What was written.

    Parameters
    ----------
    path
        The file.
    cells, genes
        The shape of its matrix.
    entries
        Non-zero counts.
    cell_types, batches
        How many there are.
    seconds
        From the first cell drawn to the last one written.
    """

    path: Path
    cells: int
    genes: int
    entries: int
    cell_types: int
    batches: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.cells:,} cells of {self.cell_types:,} types in {self.batches:,} "
            f"batches, {self.entries / self.cells:,.0f} of {self.genes:,} genes per cell, "
            f"{self.cells / self.seconds:,.0f} cells/s"
        )


def synthetic_atlas(
    path: str | Path,
    cells: int,
    *,
    genes: int = AtlasSettings.genes,
    spread: float = AtlasSettings.spread,
    cell_types: int = AtlasSettings.cell_types,
    markers: int = AtlasSettings.markers,
    marker_fold: float = AtlasSettings.marker_fold,
    batches: int = AtlasSettings.batches,
    donors: int | None = AtlasSettings.donors,
    seed: int = AtlasSettings.seed,
    compression: str | None = None,
    progress: bool | None = None,
) -> SyntheticAtlas:
    """Write an AnnData file of generated cells, of any size, in bounded memory.

    The file has raw counts (float32) of the human genes (Ensembl IDs; ``var["feature_name"]`` are
    symbols), and appears when it is complete: nothing is left of an interrupted run. The same
    arguments give the same cells, and the first cells of a large atlas are those of a small one.
    An entry takes 8 bytes before compression, in a matrix with more than two billion of them 12.

    Parameters
    ----------
    path
        Of the file to make: ``.h5ad``, or ``.zarr`` (version 3, sharded).
    cells
        How many.
    genes, spread, cell_types, markers, marker_fold, batches, donors, seed
        What the cells are like, see `synthetic.settings.AtlasSettings`: 820 genes per cell (the
        median), 10 types with 40 markers each, 4 batches.
    compression
        ``"gzip"`` or ``"lzf"`` in an .h5ad, ``"lz4"`` or ``"zstd"`` in a .zarr; None: neither.
    progress
        Show a progress bar; None: only on a terminal.

    Returns
    -------
    SyntheticAtlas
        Counts and speed; its text is one line.

    Raises
    ------
    InputError
        If an argument cannot be used, or there is something at ``path``.
    OSError
        If the file cannot be written, a full disk for one.

    Examples
    --------
    >>> cellpatch_fast.datasets.synthetic_atlas("atlas.h5ad", 10_000)  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    require_number("cells", cells, 1, MOST_CELLS)
    settings = AtlasSettings(
        genes=genes,
        spread=spread,
        cell_types=cell_types,
        markers=markers,
        marker_fold=marker_fold,
        batches=batches,
        donors=donors,
        seed=seed,
    )
    require_writable(path, compression)
    law = _law(settings)
    categories = {
        "cell_type": _names("type", cell_types),
        "batch": _names("batch", batches),
        "donor": _names("donor", law.donors),
    }
    arguments = {"cells": cells, **asdict(settings), "cellpatch-fast": version("cellpatch-fast")}
    done = entries = 0
    with (
        made_whole(path) as unfinished,
        progress_bar(cells, "writing", progress) as bar,
        AnnDataWriter(
            unfinished,
            path.suffix,
            cells=cells,
            var=_var(law, categories["cell_type"]),
            categories=categories,
            uns={"synthetic_atlas": arguments},
            index_type=_index_type(cells, law),
            compression=compression,
        ) as writer,
    ):
        started = time.perf_counter()
        for drawn in _drawn(law, cells, seed):
            number = len(drawn.types)
            codes = {
                "cell_type": drawn.types,
                "batch": drawn.donors % batches,
                "donor": drawn.donors,
            }
            names = [f"cell-{cell}" for cell in range(done, done + number)]
            writer.append(drawn.offsets, drawn.columns, drawn.counts, names, codes)
            bar.update(number)
            done += number
            entries += len(drawn.columns)
        writer.finish()
        seconds = time.perf_counter() - started
    return SyntheticAtlas(
        path=path,
        cells=cells,
        genes=len(law.columns),
        entries=entries,
        cell_types=cell_types,
        batches=batches,
        seconds=seconds,
    )


def _law(settings: AtlasSettings) -> Law:
    """What cells are drawn from."""
    from .cells_compiled import Law

    types, donors = settings.cell_types, settings.donors
    assert donors is not None  # by now
    columns = _columns_by_rank()
    means = mean_counts(len(columns))
    steps = np.floor(np.log(means[0] / means) / np.log(SIMILAR))
    bounds = np.flatnonzero(np.diff(steps)) + 1
    shuffler = np.random.default_rng(1)
    marked = MARKER_RANKS.start + shuffler.permutation(len(MARKER_RANKS))
    marked = marked[: types * settings.markers].reshape(types, settings.markers)
    captured = np.random.default_rng(2).standard_normal((settings.batches, len(columns)))
    shares = 1 / np.arange(1, types + 1)
    tried = np.geomspace(0.3, LONGEST, 300)  # genes
    return Law(
        halves=(means / 2).astype(np.float32),
        columns=columns,
        stretches=np.concatenate([[0], bounds, [len(columns)]]),
        efficiencies=np.exp(-LOST * np.abs(captured)).astype(np.float32),
        markers=marked,
        fold=settings.marker_fold,
        types=np.cumsum(shares[:-1]) / shares.sum(),
        donors=donors,
        log_genes=float(np.log(settings.genes)),
        spread=settings.spread,
        log_lengths=np.log(tried),
        log_depths=np.log(depths(tried, len(columns), _typical_efficiencies())),
    )


def _typical_efficiencies() -> tuple[float, ...]:
    """Of genes in a batch: the middles of eight equal parts."""
    normal = NormalDist()
    return tuple(np.exp(-LOST * normal.inv_cdf(0.5 + (i + 0.5) / 16)) for i in range(8))


@cache
def _columns_by_rank() -> np.ndarray:
    """int32 [genes]: where the human genes are in the reference, the most common first.

    They come in random order, the sooner the larger their weights.
    """
    human = human_genes()
    weights = np.array([WEIGHTS.get(biotype, OTHER_WEIGHT) for biotype in human.biotypes])
    first = [
        biotype == "protein_coding" and HOUSEKEEPING.fullmatch(symbol) is not None
        for symbol, biotype in zip(human.symbols, human.biotypes, strict=True)
    ]
    waiting = np.random.default_rng(0).exponential(size=len(weights)) / weights
    return np.argsort(np.where(first, waiting / 1e6, waiting)).astype(np.int32)


def _var(law: Law, types: list[str]) -> pd.DataFrame:
    """The genes, in the order of the reference."""
    import pandas as pd

    human = human_genes()
    marked = np.full(len(law.columns), -1)
    marked[law.columns[law.markers]] = np.arange(len(types))[:, None]
    return pd.DataFrame(
        {
            "feature_name": [s or e for s, e in zip(human.symbols, human.ensembl_ids, strict=True)],
            "marker_of": pd.Categorical.from_codes(marked, types),
        },
        index=pd.Index(human.ensembl_ids, dtype=object),
    )


def _names(what: str, count: int) -> list[str]:
    """Numbered from 1, in the order of the alphabet too."""
    return [f"{what} {number:0{len(str(count))}}" for number in range(1, count + 1)]


def _index_type(cells: int, law: Law) -> np.dtype[Any]:
    """Of columns and row offsets; the mean of so many cells is met to a few per cent."""
    expected = cells * float(np.exp(law.log_genes + law.spread**2 / 2))
    return np.dtype(np.int32 if 1.25 * expected < MOST_ENTRIES else np.int64)


class _Drawn(NamedTuple):
    """Cells that follow each other."""

    types: np.ndarray  # [c]
    donors: np.ndarray  # [c]
    offsets: np.ndarray  # int64 [c + 1]
    columns: np.ndarray  # int32 [n]
    counts: np.ndarray  # float32 [n]


def _drawn(law: Law, cells: int, seed: int) -> Iterator[_Drawn]:
    """All cells in order; threads draw ahead of the one that takes them."""
    from .cells_compiled import hash_seed

    block = int(max(1, BLOCK_ENTRIES / np.exp(law.log_genes + law.spread**2 / 2)))
    key = np.uint64(hash_seed(seed))  # Numba has made an int of it
    threads = min(usable_cores(), MOST_THREADS)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cellpatch-draw")
    ahead: deque[Future[list[_Drawn]]] = deque()
    try:
        for start in range(0, cells, block):
            ahead.append(pool.submit(_draw, law, key, start, min(start + block, cells)))
            if len(ahead) > threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(law: Law, key: np.uint64, start: int, stop: int) -> list[_Drawn]:
    """The cells ``start : stop``; in several parts if they are much longer than expected."""
    from ..preprocessing.ordering import digit_bits
    from .cells_compiled import draw_cells

    parts = []
    digit = digit_bits(len(law.columns))
    while start < stop:
        room = BLOCK_ENTRIES * 5 // 4 + len(law.columns)  # one cell fits at least
        columns, counts = np.empty(room, np.int32), np.empty(room, np.float32)
        types, donors = np.empty((2, stop - start), np.int16)
        lengths = np.empty(stop - start, np.int64)
        done = draw_cells(law, digit, key, start, stop, types, donors, lengths, columns, counts)
        offsets = np.concatenate([[0], np.cumsum(lengths[:done])])
        entries = slice(0, offsets[-1])
        parts.append(
            _Drawn(types[:done], donors[:done], offsets, columns[entries], counts[entries])
        )
        start += done
    return parts
