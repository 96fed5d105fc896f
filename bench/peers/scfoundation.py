"""scFoundation: a transformer over expressed genes, and a Performer that decodes all genes.

Values are embedded as a mixture of learned bins. Two tokens beside the genes tell how deeply the
cell was sequenced, and how deeply it should have been. The published classifier reads the encoder;
the decoder is what gene embeddings take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, Layer, first, into_vocabulary, pad
from bench.peers.performers import performer
from cellpatch_fast import RaggedCells

DEPTH_WANTED = 4.0  # the 10,000 reads of its default


@dataclass(frozen=True)
class Sizes:
    genes: int = 19_264
    layers: int = 12
    dim: int = 768
    heads: int = 12
    bins: int = 100
    decoder_layers: int = 6
    decoder_dim: int = 512
    decoder_heads: int = 8
    hidden: int = 256  # of the head

    def tokens(self, genes: int) -> int:
        """Tokens of the encoder; the decoder computes all genes and 2 always, in addition."""
        return min(genes, self.genes) + 2


PUBLISHED = Sizes()


class ScFoundation(Annotator):
    """scFoundation with its classifier, on the encoder or on the decoder."""

    def __init__(self, classes: int, decoder: bool = False, sizes: Sizes = PUBLISHED) -> None:
        super().__init__()
        self.sizes = sizes
        dim = sizes.dim
        self.values = BinnedSoftly(sizes.bins, dim)
        self.genes = nn.Embedding(sizes.genes + 3, dim)  # genes, both depths, padding
        self.layers = nn.ModuleList(Layer(dim, sizes.heads, 4 * dim) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(dim)
        self.decoder: nn.Sequential | None = None
        if decoder:
            dim = sizes.decoder_dim
            self.decoder = nn.Sequential(
                nn.Linear(sizes.dim, dim),
                performer(dim, sizes.decoder_layers, sizes.decoder_heads),
                nn.LayerNorm(dim),
            )
        self.head = nn.Sequential(
            nn.BatchNorm1d(dim, affine=False, eps=1e-6),
            *(nn.Linear(dim, sizes.hidden), nn.ReLU()),
            nn.Linear(sizes.hidden, classes),
        )

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        sizes = self.sizes
        cells = first(cells.to(self.device), sizes.genes)
        genes, values, *inside = pad(cells)
        genes = into_vocabulary(genes, sizes.genes)
        if inside:
            genes[~inside[0]] = sizes.genes + 2
        values = values.float()
        depth = torch.log10(values.sum(1, keepdim=True) + 1)
        depths = torch.cat([torch.full_like(depth, DEPTH_WANTED), depth], 1)
        places = torch.arange(sizes.genes, sizes.genes + 2, device=self.device)
        return (
            torch.cat([places.expand(len(genes), -1), genes], 1),
            torch.cat([depths, values], 1).to(self.dtype),
            *(F.pad(mask, (2, 0), value=True) for mask in inside),
        )

    def forward(self, genes: Tensor, values: Tensor, inside: Tensor | None = None) -> Tensor:
        x = self.values(values) + self.genes(genes)
        for layer in self.layers:
            x = layer(x, inside)
        x = self.norm(x)
        if self.decoder is not None:
            x = self._decode(genes, values, x)
        elif inside is not None:
            x = x.masked_fill(~inside.unsqueeze(-1), -torch.inf)
        logits: Tensor = self.head(x.amax(1))
        return logits

    def _decode(self, genes: Tensor, values: Tensor, encoded: Tensor) -> Tensor:
        """Embeddings of all genes and both depths, from those of a cell's genes; [c, G + 2, D]."""
        assert self.decoder is not None
        everything = self.genes.weight  # padding is the last, and decoded by nobody
        absent = self.values(values.new_zeros(1, 1))  # all that is not expressed is alike
        x = absent.repeat(len(genes), len(everything), 1)
        x = x.scatter(1, genes.unsqueeze(-1).expand_as(encoded), encoded)
        decoded: Tensor = self.decoder((x + everything)[:, :-1])
        return decoded


class BinnedSoftly(nn.Module):
    """Values [...] embedded as mixtures of bins, [..., D]."""

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, bins), nn.Linear(bins, bins)
        self.table = nn.Parameter(torch.randn(bins, dim))

    def forward(self, values: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(values.unsqueeze(-1)), 0.1)
        return torch.softmax(x + self.second(x), -1) @ self.table
