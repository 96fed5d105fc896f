"""What CellPatch sees of a spot: features of its first block, without self-attention or projection.

Three kinds:

- `frozen_features`: as the model computes them, [spots, patches · dim], reduced to principal
  components where that is asked for, by a sample of the spots and in bounded memory.
- `PatchFeatures`: computed in every step of training, which trains the encoder as well.
- `niche_features`, our own: a spot's patches attend over the entries of the spot *and* of its
  neighbours, each neighbour's with a bias of -distance² / 2σ². So the model sees a niche, in one
  softmax, without any network on the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..cells import RaggedCells
from ..config import Reading
from ..errors import InputError, InputWarning, warn
from ..genes import GeneVocabulary
from ..genes.names import var_names
from ..inference.embedder import Embedder
from ..io.sources.source import open_source
from ..kernels import patch_attention, reference
from ..loading import CellLoader
from ..loading.inputs import open_stream
from ..model import CellPatch
from ..progress import progress_bar
from .expression import SpotExpression
from .graphs import SpatialGraph

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("cellpatch_fast")

SAMPLE = 20_000  # spots that principal components are computed from
STRETCHES = 40  # of neighbours in the file, that the sample consists of
SMALLEST_VARIANCE = 1e-12  # of features, relative to their size: else they are equal in all spots
NICHE_ENTRIES = 1 << 21  # of spots and their neighbours, attended to at a time


def first_block(model: CellPatch, vocabulary: GeneVocabulary | None = None) -> CellPatch:
    """The model's patches and cross-attention block alone, with its weights; in evaluation mode.

    ``vocabulary`` has the same tokens by other names.
    """
    config = dataclasses.replace(model.config, self_attention_blocks=0, projection_dim=None)
    part = CellPatch(config, vocabulary or model.vocabulary)
    weights = model.encoder_state()
    part.load_state_dict({name: weights[name] for name in part.state_dict()})
    return part.to(model.patches.device, model.patches.dtype).eval()


def frozen_features(
    data: str | Path | AnnData,
    model: CellPatch,
    *,
    components: int = 0,
    reading: Reading = Reading(),
    backend: str | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Features of every spot's own genes.

    Parameters
    ----------
    data
        Spots x genes, or the path of a file that holds them.
    model
        Any CellPatch model.
    components
        Principal components to reduce them to; 0 for none.
    reading
        Which matrix, and what it holds.

    Returns
    -------
    np.ndarray
        float32 [spots, patches · dim], or [spots, components].
    """
    embedder = Embedder(first_block(model), backend=backend)
    with contextlib.closing(embedder.open(data, reading)) as stream:
        spots = stream.n_cells
        reduce = None
        if components:
            sample = [cells.features for cells in embedder.run([stream], _stretches(spots))]
            reduce = Components(np.concatenate(sample), components)
        width = embedder.width if reduce is None else reduce.count
        features = np.empty((spots, width), np.float32)
        with (
            progress_bar(spots, "features", progress) as bar,
            contextlib.closing(embedder.run([stream])) as batches,
        ):
            for cells in batches:
                rows = cells.features
                features[cells.rows] = rows if reduce is None else reduce(rows)
                bar.update(len(cells))
    return features


def _stretches(spots: int) -> list[tuple[int, int]]:
    """Ranges of spots that a sample consists of; all, if there are few."""
    if spots <= SAMPLE:
        return [(0, spots)]
    length = SAMPLE // STRETCHES
    starts = np.linspace(0, spots - length, STRETCHES).astype(int)
    return [(int(start), int(start) + length) for start in starts]


class Components:
    """Principal components of features: centred, and scaled by the first one's deviation.

    Parameters
    ----------
    sample
        [spots, width], that they are computed from.
    count
        Components at most.
    """

    def __init__(self, sample: np.ndarray, count: int) -> None:
        rows = torch.from_numpy(np.ascontiguousarray(sample)).double()
        self._mean = rows.mean(0)
        centred = rows - self._mean
        variances, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(rows) - 1))
        self.count = min(count, len(variances), len(rows))
        leading = vectors[:, -self.count :].flip(1)
        # a fixed sign: the largest number of a component is positive
        largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
        varying = variances[-1] > SMALLEST_VARIANCE * self._mean.square().max()
        scale = variances[-1].sqrt() if varying else torch.inf
        self._vectors = leading * largest.sign() / scale

    def __call__(self, features: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(features).double() - self._mean
        return (rows @ self._vectors).float().numpy()


class PatchFeatures(nn.Module):
    """Features of pieces' cells, with gradients.

    Parameters
    ----------
    model
        Whose first block is trained.
    cells
        The cells of each piece, prepared for the model.
    """

    def __init__(self, model: CellPatch, cells: Sequence[RaggedCells]) -> None:
        super().__init__()
        self.block = first_block(model).train()
        self._cells = cells

    @property
    def width(self) -> int:
        """Numbers per spot."""
        return self.block.config.patches * self.block.config.dim

    def forward(self, piece: int) -> Tensor:
        """float32 [spots, patches · dim] of a piece."""
        cells = self._cells[piece].to(self.block.patches.device)
        return self.block.encode(cells).flatten(1)


def cells_of(
    data: str | Path | AnnData, model: CellPatch, reading: Reading = Reading()
) -> RaggedCells:
    """All cells, prepared for a model."""
    with contextlib.closing(open_stream(data, model.vocabulary, model.config, reading)) as stream:
        loader = CellLoader([stream], batch_size=8_192, max_entries=1 << 20)
        return RaggedCells.concatenate([batch.cells for batch in loader])


def variable_cells(
    expression: SpotExpression, model: CellPatch, reading: Reading = Reading()
) -> RaggedCells:
    """All spots with all chosen genes that the model knows, zeros included, values as logged.

    ``reading`` says which column has the names.

    Raises
    ------
    InputError
        If the model knows none, or embeds binned values.
    """
    if model.config.value_embedding != "affine":
        raise InputError(
            "attending to zeros needs a model that embeds continuous values (value_embedding "
            "'affine'), but this one has bins: use attended='non-zero'"
        )
    match = model.vocabulary.match_var(expression.var, reading.gene_column, "variable genes")
    tokens = match.tokens
    columns = np.flatnonzero(tokens >= 0)
    values = expression.matrix[:, columns].toarray()
    spots, genes = values.shape
    return RaggedCells(
        torch.arange(spots + 1) * genes,
        torch.from_numpy(np.tile(tokens[columns].astype(np.int32), spots)),
        torch.from_numpy(values.ravel()),
    )


def niche_features(
    cells: RaggedCells,
    model: CellPatch,
    graph: SpatialGraph,
    *,
    sigma: float | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Features of every spot among its neighbours.

    Parameters
    ----------
    cells
        Of all spots, prepared for the model (`cells_of`).
    model
        Any CellPatch model.
    graph
        Which spots a spot attends to besides itself.
    sigma
        Distance at which an entry weighs 0.61 of one of the spot itself; None for the mean distance
        of neighbours. 0 attends to the spot itself alone.

    Returns
    -------
    np.ndarray
        float32 [spots, patches · dim].
    """
    distances = graph.distances
    if sigma is None:
        sigma = float(distances.data.mean()) if distances.nnz else 0.0
    if not 0 <= sigma < np.inf:
        raise InputError(f"sigma must be positive and finite, or 0, found {sigma}")
    block = first_block(model)
    weights, device = block.encoder_weights(), block.patches.device
    features = np.empty((len(graph), block.config.patches * block.config.dim), np.float32)
    lengths = cells.lengths.numpy()
    with progress_bar(len(graph), "niches", progress) as bar, torch.inference_mode():
        for spots in _batches(graph, lengths):
            niches, bias = _niches(spots, cells, graph, sigma)
            niches = niches.to(device)
            pads = block.pads_of(cells.take(torch.from_numpy(spots)))  # of the spot itself
            attended, _ = patch_attention(
                weights, niches.offsets, niches.genes, niches.values,
                pads=None if pads is None else pads.to(device),
                bias=bias.to(device), backend=backend,
            )  # fmt: skip
            rows = reference.finish(weights, attended).features.flatten(1)
            features[spots] = rows.float().cpu().numpy()
            bar.update(len(spots))
    return features


def _batches(graph: SpatialGraph, lengths: np.ndarray) -> list[np.ndarray]:
    """Spots in order, in batches whose niches have about `NICHE_ENTRIES` entries."""
    adjacency = graph.distances
    around = np.add.reduceat(np.append(lengths[adjacency.indices], 0), adjacency.indptr[:-1])
    around[graph.neighbours == 0] = 0
    batch = (lengths + around).cumsum() // NICHE_ENTRIES
    return np.split(np.arange(len(graph)), np.flatnonzero(np.diff(batch)) + 1)


def _niches(
    spots: np.ndarray, cells: RaggedCells, graph: SpatialGraph, sigma: float
) -> tuple[RaggedCells, Tensor]:
    """The entries of each spot and of its neighbours, as one cell, and their bias [n]."""
    edges = graph.distances[spots]
    members = np.insert(edges.indices, edges.indptr[:-1], spots)  # each spot before its neighbours
    squares = np.insert(edges.data, edges.indptr[:-1], 0.0) ** 2
    counts = np.diff(edges.indptr) + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.where(squares == 0, 0.0, -squares / (2 * sigma**2))
    chosen = cells.take(torch.from_numpy(members.astype(np.int64)))
    ends = np.append(0, counts.cumsum())
    niches = RaggedCells(chosen.offsets[torch.from_numpy(ends)], chosen.genes, chosen.values)
    of_entries = torch.from_numpy(bias.astype(np.float32)).repeat_interleave(chosen.lengths)
    return niches, of_entries


def as_written(
    data: str | Path | AnnData, model: CellPatch, reading: Reading = Reading()
) -> CellPatch:
    """The model; or its first block with symbols as the data have them, if not in capitals.

    Mouse genes are written Gad1 where human ones are GAD1: most have an orthologue of that name.
    """
    with open_source(data, layer=reading.layer, use_raw=reading.use_raw) as source:
        offered = var_names(source.var, reading.gene_column, source.name)
    vocabulary = model.vocabulary
    as_they_are = max(vocabulary.match(names).matched for names in offered.values())
    in_capitals, names = max(
        (vocabulary.match([name.upper() for name in names]).matched, names)
        for names in offered.values()
    )
    if in_capitals <= 2 * as_they_are:
        return model
    warn(
        f"{as_they_are:,} of {len(names):,} genes are known to the model, but {in_capitals:,} are "
        "if they are written in capitals, as human genes are (mouse genes are not): these are used",
        InputWarning,
    )
    written = {name.upper(): name for name in vocabulary.match(names).unknown}
    symbols = [written.get(symbol, symbol) for symbol in vocabulary.symbols]
    renamed = GeneVocabulary(vocabulary.ensembl_ids, symbols, vocabulary.tokens)
    return first_block(model, renamed)
