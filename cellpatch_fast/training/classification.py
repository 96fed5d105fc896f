"""Classification of cells: what fine-tuning trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import RaggedCells
from ..loading import CellBatch, CellLoader
from ..model import CellPatchAnnotator
from .settings import FinetuningSettings
from .task import Task, ranges_of


class _Part(NamedTuple):
    cells: RaggedCells
    codes: Tensor  # int64 [cells]


class Annotation(Task):
    """Classification of cells; ``codes`` int64 [cells of the inputs] are their classes."""

    measures = ("accuracy", "macro_f1")

    def __init__(
        self,
        model: CellPatchAnnotator,
        training: CellLoader,
        validation: CellLoader | None,
        codes: np.ndarray,
        settings: FinetuningSettings,
    ) -> None:
        self.model: CellPatchAnnotator = model
        self.training, self.validation = training, validation
        self._codes, self._settings = codes, settings
        if settings.freeze_encoder:
            model.requires_grad_(False)
            model.head.requires_grad_(True)

    def train(self) -> None:
        self.model.train(not self._settings.freeze_encoder)
        self.model.head.train()

    def targets(self, batch: CellBatch) -> int:
        return len(batch.cells)

    def parts(self, batch: CellBatch, number: int) -> Iterator[_Part]:
        codes = self._codes_of(batch)
        if number == 1:
            yield _Part(batch.cells, codes)
            return
        for start, stop in ranges_of(len(codes), number):
            yield _Part(batch.cells.slice(start, stop), codes[start:stop])

    def loss(self, part: _Part) -> Tensor:
        logits = self.model.logits(part.cells, backend=self._settings.backend)
        return F.cross_entropy(logits.float(), part.codes, reduction="sum")

    def tally(self, batch: CellBatch) -> np.ndarray:
        """Sum of losses, then the confusion matrix, truth x prediction."""
        classes, codes = len(self.model.classes), self._codes_of(batch)
        logits = self.model.logits(batch.cells, backend=self._settings.backend).float()
        pairs = classes * codes + logits.argmax(1)
        confusion = torch.bincount(pairs, minlength=classes**2)
        loss = F.cross_entropy(logits.double(), codes, reduction="sum")
        return np.array([float(loss), *confusion.tolist()])

    def summarise(self, sums: np.ndarray) -> dict[str, float]:
        classes = len(self.model.classes)
        confusion = sums[1:].reshape(classes, classes)
        right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        f1 = 2 * right / np.maximum(true + predicted, 1)
        cells = confusion.sum()
        return {
            "loss": float(sums[0] / cells),
            "accuracy": float(right.sum() / cells),
            "macro_f1": float(f1[true > 0].mean()),
        }

    def score(self, results: dict[str, float]) -> float:
        """Not the loss: a model becomes too sure of itself long before it stops getting better."""
        return results["accuracy"] + results["macro_f1"]

    def _codes_of(self, batch: CellBatch) -> Tensor:
        return torch.from_numpy(self._codes[batch.rows]).to(batch.cells.device)
