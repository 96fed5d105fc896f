"""Train the gene rows that the data have, not the whole table.

A vocabulary has 60,000 genes, data have some 12,000 of them, a batch has 5,000. Gradients, their
norm, the optimiser's step and its memory are those of the table that is trained, so that is made of
the genes that were measured: a step costs what the data's genes cost, whatever the vocabulary.

The result is that of training all rows, to rounding. A row that no cell has gets no gradient: AdamW
only makes it smaller, by the same factor in every step, which is made up for at the end. Adam's
decay is a gradient that grows with the weight, and Adam makes steps of one size of any gradient: it
would drive all those rows to 0, also what a pretrained model knows of them. They are left as they
are instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..cells import RaggedCells
from ..loading import CellBatch
from ..loading.inputs import Stream
from ..model import CellPatch


class OccurringGenes:
    """Has a model hold the gene rows of the measured genes alone, and batches name these.

    Parameters
    ----------
    model
        Its gene embedding is replaced by a smaller one until `restore`.
    streams
        The cells that it is trained on. Padding, token 0, belongs to them.
    """

    def __init__(self, model: CellPatch, streams: Sequence[Stream]) -> None:
        self._model, whole = model, model.gene_embedding.weight
        measured = np.zeros(len(whole), bool)
        measured[0] = True
        for stream in streams:
            in_stream = np.asarray(stream.measured().any(axis=0))
            measured[: len(in_stream)] |= in_stream
        self._tokens = torch.from_numpy(np.flatnonzero(measured)).to(whole.device)
        places = np.cumsum(measured) - 1
        self._places = torch.from_numpy(places.astype(np.int32)).to(whole.device)
        self._whole = whole.detach()
        model.gene_embedding = _embedding(self._whole[self._tokens], whole.requires_grad)

    def narrow(self, batch: CellBatch) -> CellBatch:
        """A batch whose genes are named by their place among those that are trained."""
        targets = None if batch.targets is None else self._narrowed(batch.targets)
        return dataclasses.replace(batch, cells=self._narrowed(batch.cells), targets=targets)

    def _narrowed(self, cells: RaggedCells) -> RaggedCells:
        return RaggedCells(cells.offsets, self._places[cells.genes.long()], cells.values)

    @contextlib.contextmanager
    def whole(self, left: float) -> Iterator[None]:
        """The model has all its gene rows meanwhile; ``left`` is what decay has left of others."""
        rows = self._model.gene_embedding
        self._model.gene_embedding = _embedding(
            self._table(rows.weight, left), rows.weight.requires_grad
        )
        try:
            yield
        finally:
            self._model.gene_embedding = rows

    def restore(self, left: float) -> None:
        """Give the model all its gene rows, for good."""
        rows = self._model.gene_embedding.weight
        self._model.gene_embedding = _embedding(self._table(rows, left), rows.requires_grad)

    def _table(self, rows: Tensor, left: float) -> Tensor:
        table = self._whole * left
        table[self._tokens] = rows.detach()
        return table


def _embedding(rows: Tensor, trained: bool) -> nn.Embedding:
    return nn.Embedding.from_pretrained(rows, freeze=not trained)
