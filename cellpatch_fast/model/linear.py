"""The linear path beside the patches: two linear models, each a table with a row for every gene.

On few cells a linear model of all genes is hard to beat, and what 64 patches of 32 numbers keep of
a cell cannot hold every gene. So an annotator may have the linear models with it, and mixes their
probabilities with the network's. What they look at, of a cell with values v:

- ``values``: v itself;
- ``seen``: e^(v/2) / Σ e^(v/2), what attention of slope ½ sees.

A gene of a cell costs two numbers per class. Both are fitted by `training.linear`, apart from the
network; nothing here is trained with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cells import RaggedCells

SLOPE = 0.5  # of attention's scores with values: weights are e^(v/2)
MEMBERS = ("values", "seen", "network")  # that are mixed, in the order of shares


class LinearPath(nn.Module):
    """Two linear models of the classes, and the shares of a mixture with the network.

    Parameters
    ----------
    genes
        Number of gene tokens.
    classes
        Number of classes.

    Attributes
    ----------
    values, seen
        [genes, classes]: what a gene speaks for.
    bias
        [2, classes]: of ``values`` and of ``seen``.
    shares
        [3], not negative, of sum 1: of `MEMBERS`.
    """

    values: Tensor
    seen: Tensor
    bias: Tensor
    shares: Tensor

    def __init__(self, genes: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(genes, classes))
        self.register_buffer("seen", torch.zeros(genes, classes))
        self.register_buffer("bias", torch.zeros(2, classes))
        self.register_buffer("shares", torch.tensor([0.0, 0.0, 1.0]))

    def logits(self, cells: RaggedCells) -> Tensor:
        """float32 [2, cells, classes], of ``values`` and of ``seen``.

        Of an empty cell it is the bias. A cell's bits do not depend on its batch: a bag is summed
        entry by entry.
        """
        genes, offsets, values = cells.genes.int(), cells.offsets.int(), cells.values.float()

        def summed(table: Tensor, weights: Tensor) -> Tensor:
            rows = genes if len(table) > 1 else torch.zeros_like(genes)
            return F.embedding_bag(
                rows,
                table.float(),
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            )

        exponentials = torch.exp(SLOPE * values)
        total = summed(exponentials.new_ones(1, 1), exponentials)  # [c, 1]
        seen = summed(self.seen, exponentials) / torch.where(total > 0, total, 1.0)
        return torch.stack([summed(self.values, values), seen]) + self.bias[:, None].float()

    def mixture(self, cells: RaggedCells, network: Tensor) -> Tensor:
        """Probabilities float32 [cells, classes] from the cells and those of the network."""
        members = [*torch.softmax(self.logits(cells), 2), network]
        return sum(
            (share * member for share, member in zip(self.shares.float(), members, strict=True)),
            torch.zeros_like(network),
        )
