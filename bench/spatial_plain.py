"""STAGATE in plain PyTorch, and by another package: what ours is timed against.

Dense expression, sums over neighbours by ``index_add``, a softmax per edge, a prediction of every
gene of every spot, and its mean squared error. Weights are tied by being the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from cellpatch_fast.spatial.embedding import WHOLE_SPOTS
from cellpatch_fast.spatial.fitting import Fit
from cellpatch_fast.spatial.graphs import SpatialGraph
from cellpatch_fast.spatial.pieces import TILE_SPOTS, piece_around, tiles_of, whole
from cellpatch_fast.spatial.settings import SpatialSettings
from cellpatch_fast.spatial.stagate import Stagate, StagateConfig

Step = Callable[[], float]  # one epoch, which returns the loss
GAIN, CLIP = 1.414, 5.0


class PlainStagate(nn.Module):
    """[genes, 512, 30, 512, genes], one head of sigmoid attention, reused in the decoder."""

    def __init__(self, genes: int, hidden: int = 512, output: int = 30) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(genes, hidden))
        self.output_weight = nn.Parameter(torch.empty(hidden, output))
        self.source = nn.Parameter(torch.empty(1, hidden))
        self.target = nn.Parameter(torch.empty(1, hidden))
        for weight in self.parameters():
            nn.init.xavier_normal_(weight, gain=GAIN)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Predicted expression [spots, genes]; ``edges`` are sources and targets [2, n]."""
        source, target = edges
        h = x @ self.hidden_weight
        scores = torch.sigmoid((h * self.source).sum(1)[source] + (h * self.target).sum(1)[target])
        weights = scores.exp()
        totals = weights.new_zeros(len(x)).index_add(0, target, weights)
        weights = (weights / totals[target])[:, None]

        def aggregate(rows: Tensor) -> Tensor:
            return torch.zeros_like(rows).index_add(0, target, weights * rows[source])

        z = F.elu(aggregate(h)) @ self.output_weight
        return F.elu(aggregate(z @ self.output_weight.T)) @ self.hidden_weight.T


def edges_of(graph: SpatialGraph) -> Tensor:
    """int64 [2, n], each spot itself included."""
    coo = (graph.distances + sparse.eye(len(graph))).tocoo()
    return torch.from_numpy(np.stack([coo.col, coo.row]).astype(np.int64))


def dense_step(model: nn.Module, x: Tensor, edges: Tensor, upstream: bool = False) -> Step:
    """An epoch of a network that predicts all genes, as STAGATE's code trains it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        told = model(x, edges)[1] if upstream else model(x, edges)
        loss = F.mse_loss(x, told)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def plain(expression: sparse.csr_matrix, graph: SpatialGraph, places: np.ndarray) -> Step:
    torch.manual_seed(0)
    model = PlainStagate(expression.shape[1])
    return dense_step(model, torch.from_numpy(expression.toarray()), edges_of(graph))


def upstream(expression: sparse.csr_matrix, graph: SpatialGraph, places: np.ndarray) -> Step:
    """stagate-modern's network."""
    from STAGATE_pyG import STAGATE

    torch.manual_seed(0)
    model = STAGATE([expression.shape[1], 512, 30])
    x = torch.from_numpy(expression.toarray())
    return dense_step(model, x, edges_of(graph), upstream=True)


def ours(
    expression: sparse.csr_matrix, graph: SpatialGraph, places: np.ndarray, **changes: str
) -> Step:
    """As `embed_tissue` computes it: in tiles, where there are many spots."""
    settings = SpatialSettings.preset("default", **changes)
    torch.manual_seed(settings.seed)
    network = Stagate(StagateConfig(expression.shape[1], tie=settings.tie))
    fit = Fit(network, None, settings, spots=len(graph))
    if len(graph) <= WHOLE_SPOTS:
        pieces = [whole(expression, graph)]
    else:
        tiles = tiles_of(places, graph.slices, TILE_SPOTS)
        pieces = [piece_around(tile, expression, graph) for tile in tiles]
    return lambda: fit.step(pieces)


def aliased(expression: sparse.csr_matrix, graph: SpatialGraph, places: np.ndarray) -> Step:
    return ours(expression, graph, places, tie="alias")
