"""scBERT: a Performer over all genes that it knows, expressed or not, and a head over all of them.

Every cell costs the same: 16,906 genes and one token more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, first, into_vocabulary
from bench.peers.performers import performer
from cellpatch_fast import RaggedCells


@dataclass(frozen=True)
class Sizes:
    genes: int = 16_906
    layers: int = 6
    dim: int = 200
    heads: int = 10
    bins: int = 7  # of expression: 0 to 5, and one for masked genes
    hidden: tuple[int, int] = (512, 128)  # of the head

    def tokens(self, genes: int) -> int:
        return self.genes + 1


PUBLISHED = Sizes()


class ScBERT(Annotator):
    """scBERT with its annotation head: a number per gene, then two hidden layers."""

    def __init__(self, classes: int, sizes: Sizes = PUBLISHED) -> None:
        super().__init__()
        self.sizes = sizes
        tokens = sizes.tokens(0)
        self.expression = nn.Embedding(sizes.bins, sizes.dim)
        self.gene2vec = nn.Embedding(tokens, sizes.dim)
        self.performer = performer(sizes.dim, sizes.layers, sizes.heads)
        self.norm = nn.LayerNorm(sizes.dim)
        self.number = nn.Linear(sizes.dim, 1)  # a convolution of a kernel as wide as a token
        wide, narrow = sizes.hidden
        self.head = nn.Sequential(
            *(nn.Linear(tokens, wide), nn.ReLU()),
            *(nn.Linear(wide, narrow), nn.ReLU()),
            nn.Linear(narrow, classes),
        )

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        genes, values = first(cells.to(self.device), self.sizes.genes).to_padded()
        bins = values.long().clamp(max=self.sizes.bins - 2)
        # genes that share a place leave the higher bin there; padding has bin 0: it changes nothing
        place = into_vocabulary(genes, self.sizes.genes)
        dense = torch.zeros(len(genes), self.sizes.genes + 1, dtype=torch.int64, device=self.device)
        return (dense.scatter_reduce(1, place, bins, "amax"),)

    def forward(self, bins: Tensor) -> Tensor:
        x = self.norm(self.performer(self.expression(bins) + self.gene2vec.weight))
        logits: Tensor = self.head(F.relu(self.number(x)).squeeze(-1))
        return logits
