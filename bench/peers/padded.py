"""CellPatch as its released code computes it: cells padded to the longest, padding attended to."""

from __future__ import annotations

from torch import Tensor

from bench.peers.annotators import Annotator, first
from bench.peers.original import PaddedPathFormerLp
from bench.peers.ours import CONFIG
from cellpatch_fast import CellPatchConfig, RaggedCells

CAP = 3000


class PaddedCellPatch(Annotator):
    """As released: attention weights are computed though nobody asks for them."""

    def __init__(self, classes: int, config: CellPatchConfig = CONFIG, cap: int = CAP) -> None:
        super().__init__()
        self.cap = cap
        self.model = PaddedPathFormerLp(
            config.max_genes,
            classes,
            patches=config.patches,
            dim=config.dim,
            heads=config.heads,
            mlp_dim=config.mlp_dim,
            self_blocks=config.self_attention_blocks,
            projection=config.projection_dim,
        )

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        genes, values = first(cells.to(self.device), self.cap).to_padded()
        return values.to(self.dtype), genes

    def forward(self, values: Tensor, genes: Tensor) -> Tensor:
        logits: Tensor = self.model(values, genes)
        return logits
