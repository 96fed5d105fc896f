"""Cells to measure with: real gene frequencies, and uniform ones.

How fast a kernel is depends on which genes cells share: a few thousand genes make up most
non-zeros, so their table rows stay in a cache. `cellpatch_fast.synthetic.frequencies` says how
common the r-th most common gene is, and how deep a cell is that has so many genes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cellpatch_fast.synthetic.frequencies import depths, detection, mean_counts
from cellpatch_fast.synthetic.settings import AtlasSettings

GENES = 60_664  # of the human reference; tokens start at 1


def draw_cells(
    cells: int, genes: int, rng: np.random.Generator, *, uniform: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [cells + 1] and gene tokens int32 [entries] of cells.

    The number of genes is log-normal with median ``genes`` and the spread of real cells. With real
    frequencies it is reached by depth, otherwise by drawing from all genes alike. Tokens are
    ascending within a cell.
    """
    lengths = np.minimum(
        genes * np.exp(AtlasSettings.spread * rng.standard_normal(cells)), 0.9 * GENES
    )
    if uniform:
        rows = [np.sort(rng.choice(GENES, int(n), replace=False)) + 1 for n in lengths]
    else:
        token = rng.permutation(GENES) + 1  # of each rank: common genes lie anywhere
        means = mean_counts(GENES)
        rows = [
            np.sort(token[rng.random(GENES) < detection(depth * means)])
            for depth in depths(lengths, GENES)
        ]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return offsets.astype(np.int64), np.concatenate(rows).astype(np.int32)


def real_cells(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and gene tokens of an AnnData file, in the human vocabulary."""
    from cellpatch_fast import GeneVocabulary, pp

    cells = pp.tokenize(str(path), GeneVocabulary.human())
    return cells.offsets.numpy(), cells.genes.numpy().astype(np.int32)
