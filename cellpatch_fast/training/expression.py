"""Training cells as a sparse matrix, and what linear algebra finds in them.

The spectral start of a new model and the linear path of an annotator begin with these. Memory is
bounded: of more cells than `MOST_ENTRIES` allow, a sample stands for all.

Two views of a cell are used. Its *values*, v = log1p(10⁴ count / total), and what patches *see* of
it with attention whose scores grow by v/2, the weights e^(v/2) / Σ e^(v/2) (of count c about √c).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, svds

from ..loading import CellLoader
from ..loading.inputs import Stream
from ..model.linear import SLOPE

logger = logging.getLogger("cellpatch_fast")

# 270 MB as float32 and int32: 33,000 cells of 1,000 genes, from which 31 components are known well
MOST_ENTRIES = 1 << 25
BATCH_CELLS = 1_024
LEAST_CELLS = 3  # that express a gene, for its variance to be trusted


class Expression(NamedTuple):
    """Values of some cells.

    Parameters
    ----------
    values
        float32 [cells, gene tokens]. A gene that a cell has twice is there twice.
    rows
        int64 [cells], ascending: which cells of the inputs these are.
    """

    values: csr_array
    rows: np.ndarray


def gather(
    streams: Sequence[Stream], rows: np.ndarray, genes: int, seed: int, threads: int | None = None
) -> Expression:
    """Values of cells of the inputs: of all ``rows``, or of as many as `MOST_ENTRIES` allow.

    Parameters
    ----------
    rows
        int64 [cells], ascending; or as ranges int64 [ranges, 2].
    genes
        Number of gene tokens.
    seed
        Of the sample, where not all cells fit.
    """
    total = sum(stream.expected_entries() for stream in streams)
    cells = sum(stream.n_cells for stream in streams)
    rows = _sampled(rows, max(1, int(MOST_ENTRIES * cells / max(1, total))), seed)
    loader = CellLoader(streams, rows=rows, batch_size=BATCH_CELLS, threads=threads)
    lengths, tokens, values = [], [], []
    with contextlib.closing(iter(loader)) as batches:
        for batch in batches:
            ragged = batch.cells
            lengths.append(ragged.lengths.numpy())
            tokens.append(ragged.genes.numpy().astype(np.int32))
            values.append(ragged.values.float().numpy().copy())
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    parts = np.concatenate(values), np.concatenate(tokens), offsets
    return Expression(csr_array(parts, shape=(len(rows), genes)), rows)


def _sampled(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of the cells, int64 [cells], ascending."""
    spans = rows if rows.ndim == 2 else np.stack([rows, rows + 1], axis=1)
    ends = np.cumsum(spans[:, 1] - spans[:, 0])  # [spans]: cells up to the end of each
    number = int(ends[-1]) if len(ends) else 0
    places = np.arange(min(number, most))
    if number > most:
        logger.info("a sample of %s of %s cells stands for all of them", f"{most:,}", f"{number:,}")
        rng = np.random.default_rng([seed, number])
        places = np.sort(rng.choice(number, most, replace=False, shuffle=False))
    span = np.searchsorted(ends, places, side="right")
    return spans[span, 1] - (ends[span] - places)


def seen(values: csr_array) -> tuple[csr_array, float]:
    """What attention of slope `SLOPE` sees of cells [cells, genes], times the mean of its sums.

    Returns
    -------
    weights
        float64 [cells, genes]: e^(v/2) / Σ e^(v/2) · scale.
    scale
        The mean of Σ e^(v/2) over the cells, so that numbers are of the size of e^(v/2).
    """
    matrix = csr_array(
        (np.exp(SLOPE * values.data.astype(np.float64)), values.indices, values.indptr),
        shape=values.shape,
    )
    sums = matrix.sum(axis=1)
    scale = float(sums[sums > 0].mean()) if (sums > 0).any() else 1.0
    matrix.data *= np.repeat(scale / np.where(sums > 0, sums, 1.0), np.diff(matrix.indptr))
    matrix.sum_duplicates()
    return matrix, scale


def gene_weights(matrix: csr_array, exponent: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Mean μ and weight w = σ^(-exponent) of each gene, float64 [genes].

    An exponent of ½ is halfway between covariances (which a few strong genes rule) and
    correlations (which noise does). Genes in fewer than `LEAST_CELLS` cells, and those that do
    not vary, have weight 0.
    """
    cells = max(1, matrix.shape[0])
    mean = matrix.sum(axis=0) / cells
    variance = matrix.power(2).sum(axis=0) / cells - mean**2
    expressed = np.bincount(matrix.indices, minlength=matrix.shape[1]) >= LEAST_CELLS
    varies = expressed & (variance > 1e-12 * np.maximum(mean**2, 1e-12))
    return mean, np.where(varies, np.where(varies, variance, 1.0) ** (-exponent / 2), 0.0)


@dataclass(frozen=True, eq=False)
class Components:
    """Leading singular vectors of the centred, weighted cells (M - μ) · w.

    Parameters
    ----------
    loadings
        float64 [genes, components], times w: the scores of cells are (M - μ) @ loadings.
    singular_values
        float64 [components], descending.
    mean
        float64 [genes]: μ.
    """

    loadings: np.ndarray
    singular_values: np.ndarray
    mean: np.ndarray

    def scores(self, matrix: csr_array) -> np.ndarray:
        """float64 [cells, components]."""
        return np.asarray(matrix @ self.loadings) - self.mean @ self.loadings


def components(matrix: csr_array, number: int, seed: int) -> Components:
    """The ``number`` leading components of cells [cells, genes], or as many as there are.

    Nothing of size cells x genes is made: the matrix stays sparse, its mean is taken away from
    products with it. Signs are fixed: the largest loading of each component is positive.
    """
    mean, weights = gene_weights(matrix)
    kept = np.flatnonzero(weights)
    number = min(number, matrix.shape[0] - 1, len(kept) - 1)
    if number < 1:
        return Components(np.zeros((matrix.shape[1], 0)), np.zeros(0), mean)
    weighted = csr_array(matrix[:, kept] * weights[kept])
    centre = mean[kept] * weights[kept]
    operator = LinearOperator(
        weighted.shape,
        dtype=np.float64,
        matvec=lambda x: weighted @ x.ravel() - centre @ x.ravel(),
        rmatvec=lambda y: weighted.T @ y.ravel() - centre * y.sum(),
    )
    start = np.random.default_rng(seed).standard_normal(min(weighted.shape))
    _, singular_values, vectors = svds(operator, k=number, v0=start)
    order = np.argsort(-singular_values)
    order = order[singular_values[order] > 1e-9 * singular_values.max()]
    directions = vectors[order].T  # [kept, components]
    strongest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[strongest, np.arange(len(order))])
    loadings = np.zeros((matrix.shape[1], len(order)))
    loadings[kept] = weights[kept, None] * directions
    return Components(loadings, singular_values[order], mean)
