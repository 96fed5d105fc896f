"""scGPT: a transformer over a random sample of a cell's genes, and a token for the cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, Layer, into_vocabulary, keep, pad
from cellpatch_fast import RaggedCells

CELL = 0  # the token of the cell, before those of its genes
NO_VALUE = -2.0  # its value, and that of padding
LARGEST = 512.0  # values are clipped


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 60_697
    layers: int = 12
    dim: int = 512
    heads: int = 8
    mlp_dim: int = 512
    sequence: int = 1200  # the cell's token among them

    def tokens(self, genes: int) -> int:
        return min(genes + 1, self.sequence)


PUBLISHED = Sizes()


class ScGPT(Annotator):
    """scGPT with its annotation head; the decoders of its pretraining are left out."""

    def __init__(self, classes: int, sizes: Sizes = PUBLISHED) -> None:
        super().__init__()
        dim = sizes.dim
        self.sizes = sizes
        self.genes = nn.Sequential(nn.Embedding(sizes.vocabulary, dim), nn.LayerNorm(dim))
        self.values = nn.Sequential(
            nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
        )
        self.layers = nn.ModuleList(
            Layer(dim, sizes.heads, sizes.mlp_dim) for _ in range(sizes.layers)
        )
        self.head = nn.Sequential(
            *(
                part
                for _ in range(2)
                for part in (nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim))
            ),
            nn.Linear(dim, classes),
        )

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        cells = cells.to(self.device)
        drawn = torch.rand(cells.entries, device=self.device)
        genes, values, *inside = pad(keep(cells, drawn, self.sizes.sequence - 1))
        genes = into_vocabulary(genes, self.sizes.vocabulary - 1, start=1)
        return (
            F.pad(genes, (1, 0), value=CELL),
            F.pad(values.to(self.dtype), (1, 0), value=NO_VALUE),
            *(F.pad(mask, (1, 0), value=True) for mask in inside),
        )

    def forward(self, genes: Tensor, values: Tensor, inside: Tensor | None = None) -> Tensor:
        x = self.genes(genes) + self.values(values.clamp(max=LARGEST).unsqueeze(-1))
        for layer in self.layers:
            x = layer(x, inside)
        logits: Tensor = self.head(x[:, 0])
        return logits
