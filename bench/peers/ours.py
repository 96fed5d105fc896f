"""CellPatch, ours: the annotator on the fastest backend of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.annotators import Annotator
from cellpatch_fast import CellPatchAnnotator, CellPatchConfig, GeneVocabulary, RaggedCells

# Of CellPatch however it is computed: the paper's numbers. The annotator does not project.
CONFIG = CellPatchConfig(projection_dim=None)


class CellPatch(Annotator):
    """Ragged cells in, logits out. On a CPU it computes in float32, whatever its dtype."""

    def __init__(self, classes: int, config: CellPatchConfig = CONFIG) -> None:
        super().__init__()
        names = [f"class {i}" for i in range(classes)]
        self.model = CellPatchAnnotator(config, GeneVocabulary.human(), names)

    def compile_kernels(self) -> None:
        """Annotate a cell of one gene: on a new machine that takes half a minute, once."""
        one = torch.ones(1, dtype=torch.uint8)
        cells = RaggedCells(torch.tensor([0, 1]), one.to(torch.uint16), one)
        with torch.inference_mode():
            self(*self.prepare(cells))

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        cells = cells.to(self.device)
        return cells.offsets, cells.genes, cells.values

    def forward(self, offsets: Tensor, genes: Tensor, values: Tensor) -> Tensor:
        return self.model.logits(RaggedCells(offsets, genes, values))
