"""A generated tissue with known layers: spots of Visium's grid, on a slice of bent cortex.

Layers are bands around a centre outside the slice, with borders that wave. Each layer has a mixture
of cell types of its own; cell types have marker genes; a spot's expression is that of some cells of
its layer's mixture, so that one spot says little and its neighbours a lot. Means and counts are
those of `frequencies`. What is made up: everything else. Made for tests, tutorials and speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from ..errors import InputError
from ..genes.names import human_genes
from .frequencies import mean_counts
from .generate import columns_by_rank

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["synthetic_tissue"]

SPACING = 100.0  # of spots, in micrometres, as on Visium
CELLS_PER_SPOT = 3.0  # whose types are drawn; on average
DOMINANCE = 0.6  # share of a layer's cells that are of its own type; the others are of any
MARKERS, MARKER_RANKS = 40, range(150, 3000)  # of a cell type; and which genes can be markers
WAVES, AMPLITUDE = 2.0, 0.06  # of the borders between layers, relative to the slice
DEPTH_SPREAD = 0.3  # of the logarithm of a spot's depth


def synthetic_tissue(
    spots: int = 2_000,
    *,
    layers: int = 6,
    genes: int = 2_000,
    depth: float = 1.0,
    marker_fold: float = 8.0,
    seed: int = 0,
) -> AnnData:
    """Generate a slice of tissue with known layers.

    Parameters
    ----------
    spots
        How many, about: as many whole rows and columns of the grid as they fill.
    layers
        Bands of the tissue, which are what domains should be.
    genes
        The most common ones; Ensembl IDs.
    depth
        Of a spot, relative to a blood cell of 10x's PBMC 3k (820 genes of all).
    marker_fold
        How much more of a marker gene there is in a cell of its type.
    seed
        Of all that is drawn.

    Returns
    -------
    AnnData
        Counts, float32 CSR; ``obs["layer"]``, ``obs["array_row"]`` and ``obs["array_col"]``;
        ``obsm["spatial"]``, micrometres [spots, 2].

    Examples
    --------
    >>> synthetic_tissue(300, layers=3).obs["layer"].nunique()
    3
    """
    counts = (("spots", spots, 4), ("layers", layers, 1), ("genes", genes, 1), ("seed", seed, 0))
    for name, number, least in counts:
        if number < least:
            raise InputError(f"{name} must be at least {least}, found {number}")
    if genes > (most := len(columns_by_rank())):
        raise InputError(f"genes must be at most {most:,}, found {genes:,}")
    for name, factor in (("depth", depth), ("marker_fold", marker_fold)):
        if not 0 < factor < np.inf:
            raise InputError(f"{name} must be positive and finite, found {factor}")
    import pandas as pd
    from anndata import AnnData

    generator = np.random.default_rng(seed)
    rows, columns = _grid(spots)
    places = np.stack([columns * SPACING / 2, rows * SPACING * np.sqrt(3) / 2], axis=1)
    layer = _layers(places, layers)
    chosen = columns_by_rank()[:genes]
    counts = _counts(layer, layers, len(chosen), depth, marker_fold, generator)
    human = human_genes()
    var = pd.DataFrame(
        {"feature_name": [human.symbols[g] or human.ensembl_ids[g] for g in chosen]},
        index=[human.ensembl_ids[g] for g in chosen],
    )
    names = [f"layer {number}" for number in range(1, layers + 1)]
    obs = pd.DataFrame(
        {
            "layer": pd.Categorical.from_codes(layer, names),
            "array_row": rows,
            "array_col": columns,
        },
        index=[f"spot-{spot}" for spot in range(len(rows))],
    )
    return AnnData(counts, obs=obs, var=var, obsm={"spatial": places})


def _grid(spots: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of Visium's array, in about a square."""
    down = max(2, round(np.sqrt(spots * 2 / np.sqrt(3))))
    across = max(2, round(spots / down))
    rows, steps = np.divmod(np.arange(down * across), across)
    return rows, 2 * steps + rows % 2


def _layers(places: np.ndarray, layers: int) -> np.ndarray:
    """Codes of the layers, int64 [spots]: bands of equal width around a far centre, waving."""
    scaled = (places - places.min(axis=0)) / np.ptp(places, axis=0)
    centre = np.array([-0.2, -0.9])
    distance = np.linalg.norm(scaled - centre, axis=1)
    angle = np.arctan2(*(scaled - centre).T)
    distance = distance + AMPLITUDE * np.sin(2 * np.pi * WAVES * angle)
    share = (distance - distance.min()) / np.ptp(distance)
    return np.minimum((share * layers).astype(np.int64), layers - 1)


def _counts(
    layer: np.ndarray,
    layers: int,
    genes: int,
    depth: float,
    marker_fold: float,
    generator: np.random.Generator,
) -> sparse.csr_matrix:
    """Counts of every spot, float32 [spots, genes]."""
    means = mean_counts(genes)
    eligible = np.arange(min(MARKER_RANKS.start, genes // 2), min(MARKER_RANKS.stop, genes))
    markers = generator.permutation(eligible)[: layers * MARKERS]
    fold = np.ones((layers, genes))  # of each cell type, as many as layers
    for kind, own in enumerate(np.array_split(markers, layers)):
        fold[kind, own] = marker_fold
    blocks = []
    for spots in np.array_split(layer, max(1, len(layer) * genes // 4_000_000)):
        mixture = np.full((len(spots), layers), (1 - DOMINANCE) / layers)
        mixture[np.arange(len(spots)), spots] += DOMINANCE
        cells = generator.poisson(CELLS_PER_SPOT * mixture) + 1e-3 * mixture
        cells /= cells.sum(axis=1, keepdims=True)
        depths = depth * np.exp(DEPTH_SPREAD * generator.standard_normal((len(spots), 1)))
        expected = depths * (cells @ fold) * means
        # negative binomial with two degrees, see `frequencies`
        drawn = generator.poisson(expected * generator.gamma(2.0, 0.5, expected.shape))
        blocks.append(sparse.csr_matrix(drawn.astype(np.float32)))
    return sparse.vstack(blocks, format="csr")
