"""A tissue to an embedding of its spots: graph, expression, features, network; in memory or beyond.

What is small is one piece in memory. A larger tissue is computed in tiles, and one whose tiles
would take more than `MEMORY` has them on disk, in a temporary folder beside the output or where the
system keeps such: so memory holds a tile and some hundred numbers per spot, whatever the size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..cells import RaggedCells
from ..config import Reading
from ..devices import default_device, usable_device
from ..errors import InputError
from ..model import CellPatch
from ..model.storage import fingerprint
from ..training.folder import EPOCHS, RunFolder
from .expression import SpotExpression, read_expression
from .features import PatchFeatures, cells_of, frozen_features, variable_cells
from .fitting import Fit
from .graphs import SpatialGraph
from .pieces import TILE_SPOTS, PieceFiles, piece_around, surroundings, tiles_of, whole
from .settings import SpatialSettings
from .stagate import Piece, Stagate, StagateConfig

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("cellpatch_fast")

WHOLE_SPOTS = 2 * TILE_SPOTS  # that are one piece, where nothing else is asked for
MEMORY = 2 << 30  # bytes of pieces that are kept in memory
ENTRY_BYTES = 28  # of a piece, per entry: it is sorted by row and by column
COLUMNS = {EPOCHS: ["epoch", "step", "loss"], "steps.csv": ["step", "loss"]}


@dataclass(frozen=True, eq=False)
class SpatialEmbedding:
    """What was computed.

    Parameters
    ----------
    rows
        float32 [spots, output].
    losses
        Mean squared error of each epoch.
    genes
        Names of the genes that it learned from.
    params
        What it depends on.
    """

    rows: np.ndarray
    losses: list[float]
    genes: Sequence[str]
    params: dict[str, Any]


def embed_tissue(
    data: str | Path | AnnData,
    places: np.ndarray,
    graph: SpatialGraph,
    model: CellPatch | str | Path | None = None,
    *,
    settings: SpatialSettings,
    features: np.ndarray | None = None,
    reading: Reading = Reading(),
    tile_spots: int | None = None,
    folder: Path | None = None,
    overwrite: bool = False,
    backend: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> SpatialEmbedding:
    """Train STAGATE on a tissue, with CellPatch's features if there is a model.

    Parameters
    ----------
    data
        Spots x genes, counts, or the path of a file that holds them.
    places
        [spots, axes]: coordinates, of which tiles are cut.
    graph
        Which spots are neighbours.
    model
        Whose features are added; None adds none.
    settings
        How, see `SpatialSettings`.
    features
        float32 [spots, width] to add instead of a model's.
    tile_spots
        Spots of a tile at most; None computes up to 16,384 spots as one piece, and more in tiles of
        8,192. It changes the result by rounding only.
    folder
        Where to keep checkpoints: a run that was interrupted goes on, with the same bits. None
        keeps none.
    overwrite
        Begin anew in ``folder``.

    Raises
    ------
    InputError
        If the input is not usable, or ``folder`` holds a run with other settings.
    """
    target = default_device() if device is None else usable_device(device)
    with contextlib.ExitStack() as stack:
        if not isinstance(model, CellPatch) and model is not None:
            model = CellPatch.from_pretrained(model)
        settings = _without_features(settings, model, features)
        scratch = _scratch(stack, data, len(graph), folder)
        expression = read_expression(
            data, variable_genes=settings.variable_genes, target_sum=settings.target_sum,
            reading=reading, folder=scratch,
        )  # fmt: skip
        if expression.matrix.shape[0] != len(graph):
            raise InputError(
                f"the graph has {len(graph):,} spots, but the data {expression.matrix.shape[0]:,}"
            )
        encoder_cells = None
        if model is not None and features is None:
            if settings.features == "frozen":
                features = frozen_features(
                    data, model, components=settings.components,
                    reading=reading, backend=backend, progress=progress,
                )  # fmt: skip
            elif settings.attended == "variable":
                encoder_cells = variable_cells(expression, model)
            else:
                encoder_cells = cells_of(data, model, reading)
        tissue = _Tissue(expression, graph, places, features)
        order, pieces = tissue.pieces(tile_spots, scratch)
        torch.manual_seed(settings.seed)
        network = Stagate(
            tissue.config(settings, model if encoder_cells else None), backend=backend
        )
        encoder = None
        if encoder_cells is not None and model is not None:
            cells = tissue.cells_of_pieces(encoder_cells, tile_spots)
            encoder = PatchFeatures(model, cells).to(target)
        fit = Fit(network.to(target), encoder, settings, spots=len(graph))
        params = {
            **dataclasses.asdict(settings),
            "model": None if model is None else fingerprint(model),
            "genes": len(expression.genes),
            "spots": len(graph),
            "tiles": len(order),
        }
        run = None
        if folder is not None:
            run = stack.enter_context(
                RunFolder(
                    folder, "spatial", params | {"entries": expression.matrix.nnz}, COLUMNS,
                    free=["epochs"], overwrite=overwrite,
                )
            )  # fmt: skip
        fit.run(pieces, run=run, progress=progress)
        rows = np.empty((len(graph), settings.output), np.float32)
        rows[np.concatenate(order)] = fit.embed(pieces)
        return SpatialEmbedding(rows, fit.losses, list(map(str, expression.genes)), params)


def _without_features(
    settings: SpatialSettings, model: CellPatch | None, features: np.ndarray | None
) -> SpatialSettings:
    """The settings, if there are the features that they need."""
    if model is None and features is None and settings.features == "trained":
        raise InputError(
            "this preset trains a CellPatch model's features with the network, but there is no "
            "model: name one, or use the preset 'default'"
        )
    return settings


def _scratch(
    stack: contextlib.ExitStack, data: object, spots: int, folder: Path | None
) -> Path | None:
    """A temporary folder for a file that may not fit into memory."""
    if not isinstance(data, str | Path) or spots <= WHOLE_SPOTS:
        return None
    beside = None if folder is None else folder.parent
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".tissue-", dir=beside)))


class _Tissue:
    """All spots, to be cut into pieces."""

    def __init__(
        self,
        expression: SpotExpression,
        graph: SpatialGraph,
        places: np.ndarray,
        features: np.ndarray | None,
    ) -> None:
        self.expression, self.graph, self.places = expression.matrix, graph, places
        self.features = features

    def config(self, settings: SpatialSettings, trained: CellPatch | None) -> StagateConfig:
        width = 0 if self.features is None else self.features.shape[1]
        if trained is not None:
            width = trained.config.patches * trained.config.dim
        return StagateConfig(
            genes=self.expression.shape[1], features=width, expression=settings.expression,
            hidden=settings.hidden, output=settings.output, tie=settings.tie, dense=settings.dense,
        )  # fmt: skip

    def tiles(self, tile_spots: int | None) -> list[np.ndarray] | None:
        """Spots of each tile; None where all are one piece."""
        if tile_spots is None and len(self.graph) <= WHOLE_SPOTS:
            return None
        return tiles_of(self.places, self.graph.slices, tile_spots or TILE_SPOTS)

    def pieces(
        self, tile_spots: int | None, scratch: Path | None
    ) -> tuple[list[np.ndarray], Sequence[Piece]]:
        """Spots of each piece's core, and the pieces."""
        tiles = self.tiles(tile_spots)
        if tiles is None:
            everything = np.arange(len(self.graph))
            return [everything], [whole(self.expression, self.graph, self.features)]
        cut = (piece_around(tile, self.expression, self.graph, self.features) for tile in tiles)
        if scratch is None or self.expression.nnz * ENTRY_BYTES <= MEMORY:
            return tiles, list(cut)
        files = PieceFiles(scratch)
        for piece in cut:
            files.add(piece)
        return tiles, files

    def cells_of_pieces(self, cells: RaggedCells, tile_spots: int | None) -> list[RaggedCells]:
        """The cells of each piece, its surroundings included."""
        tiles = self.tiles(tile_spots)
        if tiles is None:
            return [cells]
        spots = (surroundings(tile, self.graph)[0] for tile in tiles)
        return [cells.take(torch.from_numpy(members)) for members in spots]
