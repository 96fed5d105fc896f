"""TOSICA: genes summed into tokens of gene sets by a masked linear layer, then a transformer.

The layer is a dense product of all genes of the data set, zeros included, with a matrix of which a
mask leaves those weights whose gene is in the set. The mask is applied once, when the model is
made, not in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, attend, into_vocabulary
from cellpatch_fast import RaggedCells


@dataclass(frozen=True)
class Sizes:
    genes: int = 19_264
    sets: int = 300
    share: float = 0.015  # of the genes that a set has
    layers: int = 2
    dim: int = 48
    heads: int = 4

    def tokens(self, genes: int) -> int:
        return self.sets + 1


PUBLISHED = Sizes()


class TOSICA(Annotator):
    """TOSICA. The attention weights that it can report are not computed."""

    def __init__(self, classes: int, sizes: Sizes = PUBLISHED) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Linear(sizes.genes, sizes.sets * sizes.dim)
        member = torch.rand(sizes.sets, sizes.genes) < sizes.share
        member[-1] = True  # a set for all that are in none
        with torch.no_grad():
            self.embedding.weight.unflatten(0, (sizes.sets, sizes.dim)).mul_(member.unsqueeze(1))
        self.cell = nn.Parameter(torch.randn(1, 1, sizes.dim))
        self.layers = nn.ModuleList(
            PreNormLayer(sizes.dim, sizes.heads) for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, classes)

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        genes, values = cells.to(self.device).to_padded()
        dense = torch.zeros(len(genes), self.sizes.genes, device=self.device)
        dense.scatter_add_(1, into_vocabulary(genes, self.sizes.genes), values.float())
        return (dense.to(self.dtype),)

    def forward(self, values: Tensor) -> Tensor:
        x = self.embedding(values).unflatten(1, (self.sizes.sets, self.sizes.dim))
        x = torch.cat([self.cell.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class PreNormLayer(nn.Module):
    """A layer of a vision transformer: pre-norm, GELU, an MLP four times as wide."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(attend(self.queries_keys_values(self.attention_norm(x)), self.heads))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))
