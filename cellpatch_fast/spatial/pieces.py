"""A tissue in pieces that fit into memory: tiles of neighbouring spots, each with its surroundings.

What STAGATE computes of a spot depends on spots up to two steps away, so a tile with a halo of two
steps is exact: losses and gradients of tiles add up to those of the whole. Tiles are halves of
halves, cut across the longer side, so that the halo is short: of 8,192 spots on a grid some 7 %
more. Spots within a tile are sorted as cut, so that a spot's neighbours are near in memory too.

A tile holds its rows of the expression sorted by row and by column (24 bytes per entry), which is
made once; on disk if the tissue is too large (`PieceFiles`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from ..errors import InputError
from ..kernels import SparsePattern, pattern_of
from .graphs import SpatialGraph
from .stagate import Piece

TILE_SPOTS = 8_192
FEWEST_SPOTS = 16  # of a tile that is asked for: smaller ones are all halo
STEPS = 2  # layers that aggregate


def tiles_of(places: np.ndarray, slices: np.ndarray, size: int) -> list[np.ndarray]:
    """Spots of each tile, int64: at most ``size`` neighbours of one slice.

    Parameters
    ----------
    places
        [spots, axes].
    slices
        int64 [spots].
    size
        Most spots of a tile.
    """
    if size < FEWEST_SPOTS:
        raise InputError(f"a tile needs room for {FEWEST_SPOTS} spots or more, found {size}")
    tiles: list[np.ndarray] = []
    waiting = [np.flatnonzero(slices == code) for code in np.unique(slices)[::-1]]
    while waiting:
        spots = waiting.pop()
        if len(spots) <= size:
            tiles.append(spots)
            continue
        extent = np.ptp(places[spots], axis=0)
        order = np.argsort(places[spots, extent.argmax()], kind="stable")
        half = len(spots) // 2
        waiting += [spots[order[half:]], spots[order[:half]]]
    return tiles


def whole(
    expression: sparse.csr_matrix, graph: SpatialGraph, features: np.ndarray | None = None
) -> Piece:
    """All spots as one piece, in their order."""
    return _piece(np.arange(len(graph)), len(graph), len(graph), expression, graph, features)


def surroundings(core: np.ndarray, graph: SpatialGraph) -> tuple[np.ndarray, int]:
    """A tile's spots and those up to two steps away; and how many of them are up to one.

    Returns
    -------
    spots
        int64: the core, then those one step away, then those two steps away.
    near
        The first ``near`` are of the core or one step away.
    """
    spots, near = core, len(core)
    inside = np.zeros(len(graph), bool)
    inside[core] = True
    for _ in range(STEPS):
        near = len(spots)
        reached = graph.distances[spots].indices
        fresh = np.unique(reached[~inside[reached]])
        inside[fresh] = True
        spots = np.concatenate([spots, fresh])
    return spots.astype(np.int64), near


def piece_around(
    core: np.ndarray,
    expression: sparse.csr_matrix,
    graph: SpatialGraph,
    features: np.ndarray | None = None,
) -> Piece:
    """A tile and its surroundings.

    Parameters
    ----------
    core
        Its spots.
    expression
        CSR float32 [spots, genes], of the whole tissue.
    features
        float32 [spots, features], of the whole tissue; None for none.
    """
    spots, near = surroundings(core, graph)
    return _piece(spots, len(core), near, expression, graph, features)


def _piece(
    spots: np.ndarray,
    core: int,
    near: int,
    expression: sparse.csr_matrix,
    graph: SpatialGraph,
    features: np.ndarray | None,
) -> Piece:
    rows = expression[spots].astype(np.float32)
    edges = _with_selves(graph.distances[spots[:near]], spots)
    return Piece(
        core=core,
        expression=_pattern(rows),
        entries=torch.from_numpy(np.ascontiguousarray(rows.data)),
        features=None if features is None else torch.from_numpy(features[spots]).float(),
        graph=_pattern(edges),
    )


def _with_selves(edges: sparse.csr_matrix, spots: np.ndarray) -> sparse.csr_matrix:
    """Edges of the first of ``spots`` to all of them, by place; each leads to itself too."""
    place = np.full(edges.shape[1], -1, np.int64)
    place[spots] = np.arange(len(spots))
    connected = sparse.csr_matrix(
        (np.ones(len(edges.indices), np.int8), place[edges.indices], edges.indptr),
        shape=(edges.shape[0], len(spots)),
    )
    connected = (connected + sparse.eye(*connected.shape, dtype=np.int8)).tocsr()
    connected.sort_indices()
    return connected


def _pattern(matrix: sparse.csr_matrix) -> SparsePattern:
    return pattern_of(
        torch.from_numpy(matrix.indptr.astype(np.int64)),
        torch.from_numpy(matrix.indices.astype(np.int64)),
        matrix.shape[1],
    )


class PieceFiles(Sequence[Piece]):
    """Pieces in a folder, one file each, read when they are used.

    Parameters
    ----------
    folder
        Where they are, and are written to: ``00000.safetensors`` and so on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = sorted(folder.glob("*.safetensors"))

    def add(self, piece: Piece) -> None:
        """Write one more."""
        path = self.folder / f"{len(self._paths):05}.safetensors"
        named = {"core": torch.tensor([piece.core]), "entries": piece.entries}
        if piece.features is not None:
            named["features"] = piece.features
        for name, pattern in (("expression", piece.expression), ("graph", piece.graph)):
            named |= {f"{name}.{i}": tensor for i, tensor in enumerate(pattern)}
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
        self._paths.append(path)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Piece:  # type: ignore[override]
        named = load_file(self._paths[index])
        expression, graph = (
            SparsePattern(*(named[f"{name}.{i}"] for i in range(len(SparsePattern._fields))))
            for name in ("expression", "graph")
        )
        return Piece(int(named["core"]), expression, named["entries"], named.get("features"), graph)

    def __iter__(self) -> Iterator[Piece]:
        return (self[index] for index in range(len(self)))
