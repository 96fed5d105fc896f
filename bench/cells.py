"""Cells to measure with: real gene frequencies, and uniform ones.

How fast a kernel is depends on which genes cells share: a few thousand genes make up most
non-zeros, so their table rows stay in a cache. `DETECTION` is how often the r-th most common gene
is detected in 10x's PBMC 3k (2,638 cells, mean 850 genes per cell). A deeper cell is modelled
by s times as many independent chances to detect each gene, 1 - (1 - p)^s.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

GENES = 60_664  # of the human reference; tokens start at 1

# (rank, share of cells that express the gene); between them log-linear
DETECTION = [
    (1, 1.0), (22, 0.99356), (51, 0.98446), (77, 0.96171), (94, 0.92684), (116, 0.86543),
    (143, 0.78279), (176, 0.68499), (216, 0.57809), (265, 0.51213), (326, 0.45565),
    (401, 0.38135), (494, 0.32487), (607, 0.28393), (746, 0.23995), (918, 0.20622),
    (1128, 0.17437), (1387, 0.14519), (1706, 0.12282), (2098, 0.10121), (2580, 0.08036),
    (3172, 0.06331), (3900, 0.0489), (4796, 0.03639), (5898, 0.02654), (7252, 0.01744),
    (8917, 0.00986), (10965, 0.00379), (13483, 0.00114), (16579, 0.00038), (60664, 0.000002),
]  # fmt: skip


SPREAD = 0.31  # of the logarithm of genes per cell in PBMC 3k


def draw_cells(
    cells: int, genes: int, rng: np.random.Generator, *, uniform: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [cells + 1] and gene tokens int32 [entries] of cells.

    The number of genes is log-normal with median ``genes`` and spread `SPREAD`. With real
    frequencies it is reached by depth (see above), otherwise by drawing from all genes alike.
    Tokens are ascending within a cell.
    """
    lengths = np.minimum(genes * np.exp(SPREAD * rng.standard_normal(cells)), 0.9 * GENES)
    if uniform:
        rows = [np.sort(rng.choice(GENES, int(n), replace=False)) + 1 for n in lengths]
    else:
        token = rng.permutation(GENES) + 1  # of each rank: common genes lie anywhere
        ranks, shares = np.array(DETECTION).T
        log_share = np.interp(np.log(np.arange(1, GENES + 1)), np.log(ranks), np.log(shares))
        log_miss = np.log1p(-np.exp(log_share).clip(max=1 - 1e-9))
        rows = [
            np.sort(token[rng.random(GENES) < -np.expm1(chances * log_miss)])
            for chances in _chances(log_miss, lengths)
        ]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return offsets.astype(np.int64), np.concatenate(rows).astype(np.int32)


def _chances(log_miss: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The depth, relative to PBMC 3k, at which so many genes are expected."""
    depths = np.geomspace(1e-4, 1e6, 200)
    expected = [-np.expm1(depth * log_miss).sum() for depth in depths]
    return np.exp(np.interp(np.log(lengths), np.log(expected), np.log(depths)))


def real_cells(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and gene tokens of an AnnData file, in the human vocabulary."""
    from cellpatch_fast import GeneVocabulary, pp

    cells = pp.tokenize(str(path), GeneVocabulary.human())
    return cells.offsets.numpy(), cells.genes.numpy().astype(np.int32)


def write_atlas(path: Path, cells: int, genes: int, rng: np.random.Generator) -> int:
    """An .h5ad of raw counts (uncompressed, anndata's default); its number of entries.

    Two thousand cells are drawn and repeated in random order.
    """
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    from cellpatch_fast.gene_names import human_genes

    offsets, tokens = draw_cells(2_000, genes, rng)
    counts = rng.geometric(0.5, len(tokens)).astype(np.float32)
    drawn = sp.csr_matrix((counts, tokens - 1, offsets), (2_000, GENES))
    matrix = drawn[rng.integers(0, 2_000, cells)]
    var = pd.DataFrame(index=pd.Index(human_genes().ensembl_ids))
    obs = pd.DataFrame(
        {"batch": pd.Categorical(rng.integers(0, 7, cells).astype(str))},
        index=pd.Index([f"cell-{i}" for i in range(cells)]),
    )
    anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(path)
    return int(matrix.nnz)
