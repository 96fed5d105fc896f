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
from zlib import crc32

import numpy as np
import torch
from scipy import sparse

from ..cells import RaggedCells
from ..config import Reading
from ..devices import default_device, usable_device
from ..errors import InputError
from ..model import CellPatch
from ..model.storage import fingerprint
from ..training.folder import EPOCHS, RunFolder
from .expression import read_expression
from .features import PatchFeatures, as_written, cells_of, frozen_features, variable_cells
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
SCRATCH = ".tissue-"  # what the name of a temporary folder begins with
COLUMNS = {EPOCHS: ["epoch", "step", "loss"]}


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
    model: CellPatch | None = None,
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
    require_model(settings, model is not None or features is not None)
    target = default_device() if device is None else usable_device(device)
    identity = None if model is None else fingerprint(model)
    model = None if model is None else as_written(data, model, reading)
    with contextlib.ExitStack() as stack:
        scratch = _scratch(stack, data, len(graph), folder)
        expression = read_expression(
            data, variable_genes=settings.variable_genes, target_sum=settings.target_sum,
            reading=reading, folder=scratch,
        )  # fmt: skip
        if expression.matrix.shape[0] != len(graph):
            raise InputError(
                f"the graph has {len(graph):,} spots, but the data {expression.matrix.shape[0]:,}"
            )
        if model is not None and features is None and settings.features == "frozen":
            features = frozen_features(
                data, model, components=settings.components,
                reading=reading, backend=backend, progress=progress,
            )  # fmt: skip
        tissue = _Tissue(expression.matrix, graph, places, features, tile_spots)
        encoder = None
        if model is not None and features is None:
            cells = (
                variable_cells(expression, model, reading)
                if settings.attended == "variable"
                else cells_of(data, model, reading)
            )
            encoder = PatchFeatures(model, tissue.cells_of_pieces(cells)).to(target)
        stack.enter_context(  # the caller's random numbers go on as if nothing had been drawn
            torch.random.fork_rng(devices=[target] if target.type == "cuda" else [])
        )
        torch.manual_seed(settings.seed)
        network = Stagate(tissue.config(settings, encoder), backend=backend).to(target)
        fit = Fit(network, encoder, settings, spots=len(graph))
        pieces = tissue.pieces(scratch)
        params = {
            **dataclasses.asdict(settings),
            "model": identity,
            "genes": len(expression.genes),
            "spots": len(graph),
            "tiles": len(tissue.cores),
        }
        run = None
        if folder is not None:
            facts = params | dataclasses.asdict(reading) | tissue.facts()
            run = stack.enter_context(
                RunFolder(folder, "spatial", facts, COLUMNS, free=["epochs"], overwrite=overwrite)
            )
        fit.run(pieces, run=run, progress=progress)
        rows = np.empty((len(graph), settings.output), np.float32)
        rows[np.concatenate(tissue.cores)] = fit.embed(pieces)
        return SpatialEmbedding(rows, fit.losses, list(map(str, expression.genes)), params)


def require_model(settings: SpatialSettings, given: bool) -> None:
    """Refuse settings that train a model's features, unless one is given."""
    if settings.features == "trained" and not given:
        raise InputError(
            "this preset trains a CellPatch model's features with the network, but there is no "
            "model: name one, or use the preset 'default'"
        )


def _scratch(
    stack: contextlib.ExitStack, data: object, spots: int, folder: Path | None
) -> Path | None:
    """A temporary folder for a file that may not fit into memory."""
    if not isinstance(data, str | Path) or spots <= WHOLE_SPOTS:
        return None
    beside = None if folder is None else folder.parent
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH, dir=beside)))


class _Tissue:
    """All spots, cut into pieces.

    Attributes
    ----------
    cores
        Spots of each piece that its loss is computed of, int64.
    """

    def __init__(
        self,
        expression: sparse.csr_matrix,
        graph: SpatialGraph,
        places: np.ndarray,
        features: np.ndarray | None,
        tile_spots: int | None,
    ) -> None:
        self._expression, self._graph, self._features = expression, graph, features
        self._whole = tile_spots is None and len(graph) <= WHOLE_SPOTS
        self.cores = [np.arange(len(graph))]
        if not self._whole:
            self.cores = tiles_of(places, graph.slices, tile_spots or TILE_SPOTS)

    def facts(self) -> dict[str, Any]:
        """What tells it from another tissue; of values that other machines compute as well."""
        content = 0
        for matrix in (self._expression, self._graph.distances):
            content = crc32(matrix.indices, crc32(matrix.indptr, content))
        edges = {"edges": int(self._graph.distances.nnz)}
        return {
            "entries": int(self._expression.nnz),
            "graph": self._graph.params() | edges,
            "content": f"{content:08x}",
        }

    def config(self, settings: SpatialSettings, encoder: PatchFeatures | None) -> StagateConfig:
        """The shape of the network."""
        width = 0 if self._features is None else self._features.shape[1]
        if encoder is not None:
            width = encoder.width
        return StagateConfig(
            genes=self._expression.shape[1], features=width, expression=settings.expression,
            hidden=settings.hidden, output=settings.output, tie=settings.tie, dense=settings.dense,
        )  # fmt: skip

    def pieces(self, scratch: Path | None) -> Sequence[Piece]:
        """The pieces, in ``scratch`` if there is such a folder and they are large."""
        if self._whole:
            return [whole(self._expression, self._graph, self._features)]
        cut = (piece_around(c, self._expression, self._graph, self._features) for c in self.cores)
        if scratch is None or self._expression.nnz * ENTRY_BYTES <= MEMORY:
            return list(cut)
        files = PieceFiles(scratch)
        for piece in cut:
            files.add(piece)
        return files

    def cells_of_pieces(self, cells: RaggedCells) -> list[RaggedCells]:
        """The cells of each piece, its surroundings included."""
        if self._whole:
            return [cells]
        spots = (surroundings(core, self._graph)[0] for core in self.cores)
        return [cells.take(torch.from_numpy(members)) for members in spots]
