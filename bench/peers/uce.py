"""UCE: a transformer over 1,024 genes drawn by expression, each embedded by its protein.

A gene may be drawn many times. Drawn genes are ordered by chromosome and place, each chromosome
between two tokens of its own, behind a token for the cell: 1,073 tokens, which the released code
pads to 1,536 and cuts again at the longest of the batch, so that no more are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, Layer, into_vocabulary, pad
from cellpatch_fast import RaggedCells

CLOSE, CELL = 2, 3  # tokens; 0 is padding, 1 unused


@dataclass(frozen=True)
class Sizes:
    layers: int = 33
    dim: int = 1280
    heads: int = 20
    mlp_dim: int = 5120
    protein_dim: int = 5120  # of the protein language model
    genes: int = 19_790
    chromosomes: int = 24
    drawn: int = 1024

    @property
    def start(self) -> int:
        """Token of the first gene: before it are special tokens, and one for each chromosome."""
        return 4 + self.chromosomes

    def tokens(self, genes: int) -> int:
        return 1 + self.drawn + 2 * self.chromosomes


PUBLISHED = Sizes()
SMALL = Sizes(layers=4)


class UCE(Annotator):
    """UCE, and a linear classifier on its embedding."""

    proteins: Tensor
    positions: Tensor

    def __init__(self, classes: int, sizes: Sizes = PUBLISHED) -> None:
        super().__init__()
        self.sizes = sizes
        dim = sizes.dim
        # Not the model's but the protein language model's; normalised once, not in every batch.
        table = torch.randn(sizes.start + sizes.genes, sizes.protein_dim)
        self.register_buffer("proteins", F.normalize(table, dim=1))
        self.register_buffer("positions", sinusoids(sizes.tokens(0), dim))
        self.encoder = nn.Sequential(
            nn.Linear(sizes.protein_dim, dim), nn.GELU(), nn.LayerNorm(dim)
        )
        self.layers = nn.ModuleList(
            Layer(dim, sizes.heads, sizes.mlp_dim) for _ in range(sizes.layers)
        )
        self.decoder = nn.Sequential(
            *_block(dim, 1024), *_block(1024, dim), *_block(dim, dim), nn.Linear(dim, dim)
        )
        self.head = nn.Linear(dim, classes)

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        sizes = self.sizes
        genes, values, *inside = pad(cells.to(self.device))
        weights = values.float().clamp(min=0.5)
        if inside:
            weights = weights * inside[0]
        drawn = genes.gather(1, torch.multinomial(weights, sizes.drawn, replacement=True))
        drawn = into_vocabulary(drawn, sizes.genes).sort(1).values
        # chromosomes in an order of their own for each batch, the genes of one ascending
        rank = torch.randperm(sizes.chromosomes, device=self.device)
        of_gene = rank[drawn * sizes.chromosomes // sizes.genes]  # [c, drawn]
        of_gene, order = of_gene.sort(dim=1, stable=True)
        drawn = drawn.gather(1, order)
        tokens = drawn.new_full((len(drawn), sizes.tokens(0)), CLOSE)
        tokens[:, 0] = CELL
        place = torch.arange(sizes.drawn, device=self.device) + 2 * of_gene + 2
        tokens.scatter_(1, place, sizes.start + drawn)
        chromosomes = torch.arange(sizes.chromosomes, device=self.device)
        before = torch.searchsorted(of_gene, chromosomes.expand(len(drawn), -1).contiguous())
        tokens.scatter_(1, before + 2 * chromosomes + 1, (4 + rank.argsort()).expand_as(before))
        return (tokens,)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(F.embedding(tokens, self.proteins)) * math.sqrt(self.sizes.dim)
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(F.normalize(self.decoder(x[:, 0]), dim=1))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU()


def sinusoids(tokens: int, dim: int) -> Tensor:
    """Sines and cosines of the position, [tokens, D]."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angles = torch.arange(tokens)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
